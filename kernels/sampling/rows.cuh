// A row's place in memory, its settings, and its segments in registers.
#pragma once

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
  static __device__ __forceinline__ float rate_of(double temperature) {
    return fminf(static_cast<float>(1.4426950408889634 / temperature), 3e38f);
  }
};

// log2(e) / temperature where no filter makes a row of temperature 0 greedy: then only the largest
// elements have weight.
__device__ __forceinline__ float softmax_rate(const Setting& temperature, uint32 row) {
  const double given = setting_of(temperature, row);
  return given > 0.0 ? RowFilters::rate_of(given) : 3e38f;
}

// Elements of a segment that a lane holds: element j of lane l is number
// (j / kVec) * 32 * kVec + l * kVec + j % kVec.
constexpr int kHeld = kSegmentSize / 32;

template <int kVec>
__device__ __forceinline__ uint32 held_index(int j, uint32 lane) {
  return (j / kVec * kWarpSize + lane) * kVec + j % kVec;
}

// With kVec > 1 the vocabulary is a multiple of kVec.
template <int kVec, class T>
__device__ __forceinline__ void load_segment(const T* row, uint32 first, uint32 vocab, uint32 lane,
                                             float padding, float (&x)[kHeld]) {
  Vec<T, kVec> fetched[kHeld / kVec];
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i) {
    const uint32 index = first + held_index<kVec>(i * kVec, lane);
    if (index < vocab) {
      fetched[i] = load<kVec>(row + index);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) fetched[i].elements[j] = from_float<T>(padding);
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) x[j] = to_float(fetched[j / kVec].elements[j % kVec]);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

__device__ __forceinline__ uint64 warp_sum(uint64 x) {
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// What all lanes make of their elements, the largest of which is `lane_max`.
template <class Kind>
__device__ __forceinline__ SegmentStats segment_stats(const float (&x)[kHeld], float lane_max,
                                                      float rate) {
  bool bad = false;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) bad |= Kind::is_bad(x[j]);
  const float max = warp_max(lane_max);
  const typename Kind::Weigher weigher = Kind::weigher(max, rate);
  Mass mass;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) mass.add(weigher.weight(x[j]));
  const uint64 sum = warp_sum(mass.sum());
  if (__any_sync(kFullWarp, bad)) return {__uint_as_float(0x7fffffffu), 0, 0};
  return {max, 0, sum};
}

template <class Kind>
__device__ __forceinline__ SegmentStats segment_stats(const float (&x)[kHeld], float rate) {
  float lane_max = Kind::padding();
#pragma unroll
  for (int j = 0; j < kHeld; ++j) lane_max = fmaxf(lane_max, x[j]);
  return segment_stats<Kind>(x, lane_max, rate);
}

}  // namespace ridgeline
