// From an element of a row to its weight, and from weights to sums that no order of addition
// changes.
//
// A kind (Logits<T> or Probs) tells what an element means: its weight is exp((x - max) /
// temperature) or x itself over a power of two at or above the largest; both are in [0, 1]. Weights
// are added as integers, a mass of 2^42 for a weight of 1: sums do not depend on the order, so
// blocks and atomics may take part in any, and no token of weight 0 is ever drawn. What rounding
// loses of a row of 2^18 elements is below 2^-24 of its largest weight.
#pragma once

#include "common/fast_math.cuh"
#include "common/vec.cuh"
#include "sampling/params.h"

namespace ridgeline {

// round(weight * 2^kMassBits), as high * 2^21 + low, without the slow conversion units: added to 4,
// a weight is rounded to units of 2^-21 in the low bits of the float, and what that leaves of it,
// added to 1.5 * 2^-19, to units of 2^-42. Every step but these two is exact.
struct Mass {
  uint32 high = 0;
  uint32 low = 0;  // signed, modulo 2^32

  __device__ __forceinline__ void add(float weight) {
    constexpr float kHigh = 4.0f, kLow = 0x1.8p-19f;
    const float high_part = weight + kHigh;
    const float low_part = weight + ((kHigh + kLow) - high_part);
    high += __float_as_uint(high_part) - 0x40800000u;
    low += __float_as_uint(low_part) - 0x36400000u;
  }
  // Of at most 1,024 weights.
  __device__ __forceinline__ uint64 sum() const {
    return (static_cast<uint64>(high) << 21) +
           static_cast<uint64>(static_cast<int64>(static_cast<int32>(low)));
  }
};

__device__ __forceinline__ uint64 mass_of(float weight) {
  Mass mass;
  mass.add(weight);
  return mass.sum();
}

__device__ __forceinline__ uint64 scaled_mass(uint64 mass, float scale) {
  return static_cast<uint64>(static_cast<double>(mass) * static_cast<double>(scale));
}

struct LogitWeigher {
  float reference;
  float rate;  // log2(e) / temperature
  __device__ __forceinline__ float weight(float x) const {
    return exp2_fast((x - reference) * rate);
  }
  // Of this segment's masses, in a row of weigher `row`. Why at most 1: the reference of a segment
  // of nothing but -inf may be above the row's, and infinitely many times nothing is NaN.
  __device__ __forceinline__ float scale_in(const LogitWeigher& row) const {
    return exp2_fast(fminf((reference - row.reference) * rate, 0.0f));
  }
  // Logarithm to base 2 of x's weight.
  __device__ __forceinline__ float log_weight(float x) const { return (x - reference) * rate; }
};

template <class T>
struct Logits {
  using Element = T;
  using Weigher = LogitWeigher;
  static constexpr uint32 kLeastKey = 0x00800000u;  // of the least number above -inf
  static __device__ __forceinline__ float padding() { return -kInfinity; }
  static constexpr bool kNegative = true;  // elements may be
  // Of elements of which `max` is the largest, NaN if one of them is; and `min` the least, or 0.
  static __device__ __forceinline__ bool is_bad(float, float max) { return !(max < kInfinity); }
  static __device__ __forceinline__ Weigher weigher(float max, float rate) {
    return {max > -kInfinity ? max : 0.0f, rate};
  }
  // The least element that min-p keeps.
  static __device__ __forceinline__ float min_p_bound(float max, double min_p, double temperature) {
    return __double2float_ru(static_cast<double>(max) + temperature * log(min_p));
  }
};

struct ProbWeigher {
  float rate;  // a power of two
  __device__ __forceinline__ float weight(float x) const { return x * rate; }
  __device__ __forceinline__ float scale_in(const ProbWeigher& row) const {
    return row.rate / rate;
  }
  __device__ __forceinline__ float log_weight(float x) const { return log2f(x * rate); }
};

struct Probs {
  using Element = float;
  using Weigher = ProbWeigher;
  static constexpr uint32 kLeastKey = 0x80000001u;  // of the least number above 0
  static __device__ __forceinline__ float padding() { return 0.0f; }
  static constexpr bool kNegative = false;
  static __device__ __forceinline__ bool is_bad(float min, float max) {
    return !(min >= 0.0f && max <= 0x1p100f);
  }
  // Over the power of two above `max`.
  static __device__ __forceinline__ Weigher weigher(float max, float) {
    const int exponent = static_cast<int>(__float_as_uint(max) >> 23) - 126;
    const int bounded = exponent < -100 ? -100 : exponent;
    return {__uint_as_float(static_cast<uint32>(127 - bounded) << 23)};
  }
  static __device__ __forceinline__ float min_p_bound(float max, double min_p, double) {
    return __double2float_ru(static_cast<double>(max) * min_p);
  }
};

}  // namespace ridgeline
