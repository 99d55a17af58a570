// A row's place in memory, its settings, and its segments in registers.
#pragma once

#include "common/arch.cuh"
#include "common/reduce.cuh"
#include "sampling/weight.cuh"

namespace ridgeline {

__device__ __forceinline__ double setting_of(const Setting& setting, uint32 row) {
  return setting.values ? static_cast<double>(setting.values[row * setting.stride]) : setting.value;
}

__device__ __forceinline__ int64 setting_of(const IntSetting& setting, uint32 row) {
  if (!setting.values) return setting.value;
  if (setting.is_wide) return static_cast<const int64*>(setting.values)[row * setting.stride];
  return static_cast<const int32*>(setting.values)[row * setting.stride];
}

// Its first element. Indices out of range are clamped.
template <class T>
__device__ __forceinline__ const T* row_data(const RowInput& input, uint32 row) {
  int64 source = row;
  if (input.indices.values) {
    source = setting_of(input.indices, row);
    const int64 last = static_cast<int64>(input.num_inputs) - 1;
    source = source < 0 ? 0 : source > last ? last : source;
  }
  return static_cast<const T*>(input.data) + source * input.row_stride;
}

// A row's lists.
__device__ __forceinline__ uint64* list_of(const Scratch& scratch, uint32 row) {
  return scratch.candidates + static_cast<int64>(row) * scratch.row_capacity;
}

// A row's filters, with what switches them off made plain.
struct RowFilters {
  float rate;          // log2(e) / temperature
  double temperature;  // 1 for a greedy row
  uint32 k;            // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off

  __device__ __forceinline__ RowFilters(const Filters& filters, uint32 row, uint32 vocab)
      : temperature(setting_of(filters.temperature, row)),
        top_p(setting_of(filters.top_p, row)),
        min_p(setting_of(filters.min_p, row)) {
    const int64 given = setting_of(filters.top_k, row);
    k = given > 0 && given < vocab ? static_cast<uint32>(given) : 0;
    // Why !(a > b): NaN switches a filter off.
    if (!(top_p < 1.0)) top_p = 1.0;
    if (!(min_p > 0.0)) min_p = 0.0;
    if (!(temperature > 0.0)) {
      temperature = 1.0;
      k = 1;
      top_p = 1.0;
      min_p = 0.0;
    }
    rate = rate_of(temperature);
  }
  __device__ __forceinline__ bool any() const { return k > 0 || top_p < 1.0 || min_p > 0.0; }
  // Never 0, which would make NaN of -inf.
  static __device__ __forceinline__ float rate_of(double temperature) {
    const auto rate = static_cast<float>(1.4426950408889634 / temperature);
    return fmaxf(fminf(rate, 3e38f), 1.2e-38f);
  }
};

// log2(e) / temperature where no filter makes a row of temperature 0 greedy: then only the largest
// elements have weight. A row that is drawn of has the weights of temperature 1 there.
__device__ __forceinline__ float softmax_rate(const Setting& temperature, uint32 row,
                                              bool draws = false) {
  const double given = setting_of(temperature, row);
  if (!(given > 0.0) && !draws) return 3e38f;
  return RowFilters::rate_of(given > 0.0 ? given : 1.0);
}

// Elements of a segment that a lane holds: element j of lane l is number
// (j / kVec) * 32 * kVec + l * kVec + j % kVec.
constexpr int kHeld = kSegmentSize / 32;

template <int kVec>
__device__ __forceinline__ uint32 held_index(int j, uint32 lane) {
  return (j / kVec * kWarpSize + lane) * kVec + j % kVec;
}

// With kVec > 1 the vocabulary is a multiple of kVec. kOnce: past L1, since the block does not read
// any of it again.
template <int kVec, bool kOnce = true, class T>
__device__ __forceinline__ void load_segment(const T* row, uint32 first, uint32 vocab, uint32 lane,
                                             float padding, float (&x)[kHeld]) {
  Vec<T, kVec> fetched[kHeld / kVec];
  const T* mine = row + first + lane * kVec;
  if (first + kSegmentSize <= vocab) {
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      const T* piece = mine + i * kWarpSize * kVec;
      fetched[i] = kOnce ? load_once<kVec>(piece) : load<kVec>(piece);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      if (first + held_index<kVec>(i * kVec, lane) < vocab) {
        fetched[i] = load<kVec>(mine + i * kWarpSize * kVec);
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) fetched[i].elements[j] = from_float<T>(padding);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) x[j] = to_float(fetched[j / kVec].elements[j % kVec]);
}

// The larger, or NaN if there is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// Of no NaN.
__device__ __forceinline__ float warp_max(float x) {
#if __CUDA_ARCH__ >= 800
  // Larger integers for larger numbers; twice is nothing.
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(kFullWarp, ordered(__float_as_int(x)))));
#else
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
#endif
}

__device__ __forceinline__ uint32 warp_max(uint32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, x);
#else
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint32 other = __shfl_xor_sync(kFullWarp, x, offset);
    x = x > other ? x : other;
  }
  return x;
#endif
}

__device__ __forceinline__ uint32 warp_min(uint32 x) {
  return ~warp_max(~x);
}

__device__ __forceinline__ uint32 warp_sum(uint32 x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, x);
#else
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
#endif
}

__device__ __forceinline__ uint64 warp_sum(uint64 x) {
#if __CUDA_ARCH__ >= 800
  // 27 bits of 32 numbers fit 32 bits.
  constexpr int kBits = 27;
  constexpr uint32 kMask = (1u << kBits) - 1;
  const uint64 low = warp_sum(static_cast<uint32>(x) & kMask);
  const uint64 middle = warp_sum(static_cast<uint32>(x >> kBits) & kMask);
  const uint64 high = warp_sum(static_cast<uint32>(x >> (2 * kBits)));
  return low + (middle << kBits) + (high << (2 * kBits));
#else
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
#endif
}

// Of all lanes' weights, a segment's at most.
__device__ __forceinline__ uint64 warp_mass(const Mass& mass) {
  return Mass{warp_sum(mass.high), warp_sum(mass.low)}.sum();
}

// NaN if there is one.
template <int kFirst = 0, int kLast = kHeld>
__device__ __forceinline__ float lane_max(const float (&x)[kHeld]) {
  float max = x[kFirst];
#pragma unroll
  for (int j = kFirst + 1; j < kLast; ++j) max = max_or_nan(max, x[j]);
  return max;
}

// What all lanes make of their elements, the largest of which is `mine_max`, or NaN. Calls use(j,
// weight) for each, unless the segment is bad; weights are relative to the segment's largest.
template <class Kind, class Use>
__device__ __forceinline__ SegmentStats segment_stats(const float (&x)[kHeld], float mine_max,
                                                      float rate, const Use& use) {
  float mine_min = 0.0f;
  if constexpr (!Kind::kNegative) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) mine_min = fminf(mine_min, x[j]);
  }
  if (__any_sync(kFullWarp, Kind::is_bad(mine_min, mine_max))) {
    return {__uint_as_float(0x7fffffffu), 0, 0};
  }
  const float max = warp_max(mine_max);
  const typename Kind::Weigher weigher = Kind::weigher(max, rate);
  Mass mass;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const float weight = weigher.weight(x[j]);
    mass.add(weight);
    use(j, weight);
  }
  return {max, 0, warp_mass(mass)};
}

template <class Kind>
__device__ __forceinline__ SegmentStats segment_stats(const float (&x)[kHeld], float mine_max,
                                                      float rate) {
  return segment_stats<Kind>(x, mine_max, rate, [](int, float) {});
}

// Puts the weights in the elements' place.
template <class Kind>
__device__ __forceinline__ SegmentStats weigh_segment(float (&x)[kHeld], float rate) {
  return segment_stats<Kind>(x, lane_max(x), rate, [&](int j, float weight) { x[j] = weight; });
}

}  // namespace ridgeline
