// Where a row's elements come from: the whole row, or the candidates that collect_candidates left.
#pragma once

#include "sampling/order.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

template <class T>
struct RowSource {
  const T* row;
  uint32 vocab;
  Order order;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    constexpr uint32 kUnroll = 4;
    uint32 index = threadIdx.x;
    for (; index + (kUnroll - 1) * kRowThreads < vocab; index += kUnroll * kRowThreads) {
      float x[kUnroll];
#pragma unroll
      for (uint32 i = 0; i < kUnroll; ++i) x[i] = to_float(row[index + i * kRowThreads]);
#pragma unroll
      for (uint32 i = 0; i < kUnroll; ++i) {
        visit(order.composite(x[i], index + i * kRowThreads), x[i]);
      }
    }
    for (; index < vocab; index += kRowThreads) {
      const float x = to_float(row[index]);
      visit(order.composite(x, index), x);
    }
  }
};

// Several warps take a part's list, or all of them when there is one.
struct CandidateSource {
  const uint64* candidates;  // [num_parts, kPartCapacity]
  const PartInfo* parts;     // [num_parts]
  uint32 num_parts;
  Order order;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    const uint32 num_groups =
        num_parts < kRowThreads / kWarpSize ? num_parts : kRowThreads / kWarpSize;
    const uint32 warp = threadIdx.x / kWarpSize;
    const uint32 warps_each = kRowThreads / kWarpSize / num_groups;
    const uint32 step = warps_each * kWarpSize;
    const uint32 start = warp % warps_each * kWarpSize + threadIdx.x % kWarpSize;
    if (warp >= num_groups * warps_each) return;
    for (uint32 part = warp / warps_each; part < num_parts; part += num_groups) {
      const uint32 count = parts[part].count;
      const uint64* list = candidates + static_cast<int64>(part) * kPartCapacity;
#pragma unroll 2
      for (uint32 i = start; i < count; i += step) visit(list[i], order.value(list[i]));
    }
  }
};

__device__ __forceinline__ CandidateSource candidates_of(const Scratch& scratch, uint32 row,
                                                         const Order& order) {
  return {list_of(scratch, row),
          scratch.parts ? scratch.parts + static_cast<int64>(row) * scratch.num_parts : nullptr,
          scratch.num_parts, order};
}

// Whether a row's lists are complete, down to which key, and how many candidates they hold.
struct Complete {
  bool all;  // false: a list has overflowed, or nothing was collected
  uint32 bound;
  uint32 count;
};

// Every warp for itself.
__device__ __forceinline__ Complete complete_from(const CandidateSource& source) {
  if (!source.parts) return {false, 0, 0};
  uint32 bound = 0, count = 0;
  bool overflow = false;
  for (uint32 i = threadIdx.x % kWarpSize; i < source.num_parts; i += kWarpSize) {
    const PartInfo info = source.parts[i];
    overflow |= info.count == kOverflow;
    bound = bound > info.bound ? bound : info.bound;
    count += info.count;
  }
  return {!__any_sync(kFullWarp, overflow), warp_max(bound), warp_sum(count)};
}

}  // namespace ridgeline
