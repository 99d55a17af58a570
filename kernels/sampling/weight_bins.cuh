// 2,048 bins of the logarithm of weights, 32 an octave, 24 octaves above a reference element and 40
// below it. Bins follow the order of the elements (each step from x to its bin is monotone); the
// first and the last take what is beyond.
#pragma once

#include "common/reduce.cuh"
#include "sampling/order.cuh"
#include "sampling/weight.cuh"

namespace ridgeline {

constexpr int kBinsPerOctave = 32;
constexpr int kReferenceBin = kWeightBins - 24 * kBinsPerOctave;

// Bounds of the mass of each element of a bin, in a row of weigher `row`.
struct MassBounds {
  uint64 least;
  uint64 most;
};

__device__ __forceinline__ MassBounds mass_bounds(uint32 bin, float low, float high) {
  // Why the slack: weights and bins are rounded, by less than 2^-14 where weights have mass.
  constexpr double kOne = 0x1p42, kSlack = 0x1p-12;
  const double least = bin == 0 ? 0.0 : static_cast<double>(low) * (kOne * (1 - kSlack));
  const double most =
      bin == kWeightBins - 1 ? kOne : static_cast<double>(high) * (kOne * (1 + kSlack));
  return {static_cast<uint64>(fmin(least, kOne)), static_cast<uint64>(fmin(most, kOne)) + 1};
}

template <class Kind>
struct WeightBins;

template <class T>
struct WeightBins<Logits<T>> {
  float reference;
  float rate;

  __device__ __forceinline__ uint32 of(float x) const {
    // Added to 2^23, a number is rounded to an integer in the low bits.
    constexpr float kFirst = 0x1p23f, kLast = kFirst + static_cast<float>(kWeightBins - 1);
    const float place =
        fmaf(x - reference, rate * kBinsPerOctave, kFirst + static_cast<float>(kReferenceBin));
    return __float_as_uint(fminf(fmaxf(place, kFirst), kLast)) & (kWeightBins - 1);
  }
  __device__ __forceinline__ MassBounds bounds(uint32 bin, const LogitWeigher& row) const {
    const float octaves = (reference - row.reference) * rate;
    const float middle = static_cast<float>(static_cast<int>(bin) - kReferenceBin);
    return mass_bounds(bin, exp2_fast(octaves + (middle - 0.5f) / kBinsPerOctave),
                       exp2_fast(octaves + (middle + 0.5f) / kBinsPerOctave));
  }
};

template <>
struct WeightBins<Probs> {
  float reference;
  float rate;

  static constexpr int kShift = 18;
  __device__ __forceinline__ int offset() const {
    return static_cast<int>(__float_as_uint(reference) >> kShift) - kReferenceBin;
  }
  __device__ __forceinline__ uint32 of(float x) const {
    // Why signed: -0 is in the first bin.
    const int place = (static_cast<int>(__float_as_uint(x)) >> kShift) - offset();
    const int last = kWeightBins - 1;
    return static_cast<uint32>(place < 0 ? 0 : place > last ? last : place);
  }
  // Edges beyond the numbers that there are belong to bins without elements.
  __device__ __forceinline__ MassBounds bounds(uint32 bin, const ProbWeigher& row) const {
    const auto edge = [&](int place) {
      const int bounded = place < 0 ? 0 : place > 0x1fdf ? 0x1fdf : place;
      return row.weight(__uint_as_float(static_cast<uint32>(bounded) << kShift));
    };
    const int place = static_cast<int>(bin) + offset();
    return mass_bounds(bin, edge(place), edge(place + 1));
  }
};

// The least element of bin `bin` or a later one, but no less than `Kind` has weight for; infinity
// if there is none. The warp looks for it together.
template <class Kind>
__device__ __forceinline__ float least_of_bin(const WeightBins<Kind>& bins, uint32 bin) {
  constexpr uint32 kLargestKey = 0xff7fffffu;  // of a finite number
  if (bin >= kWeightBins || bins.of(value_of(kLargestKey)) < bin) return kInfinity;
  uint32 low = Kind::kLeastKey - 1, high = kLargestKey;
  while (high - low > 1) {
    // The last lanes' keys are at or beyond the one that is known to reach the bin.
    const uint32 step = (high - low) / kWarpSize + 1;
    const uint32 above = step * (threadIdx.x % kWarpSize + 1);
    const uint32 key = above < high - low ? low + above : high;
    const uint32 reached = __ballot_sync(kFullWarp, bins.of(value_of(key)) >= bin);
    const uint32 first = static_cast<uint32>(__ffs(static_cast<int>(reached))) - 1;
    high = high - low > step * (first + 1) ? low + step * (first + 1) : high;
    low += step * first;
  }
  return value_of(high);
}

}  // namespace ridgeline
