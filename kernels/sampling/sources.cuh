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

// A warp takes a slice's list.
struct CandidateSource {
  const uint64* candidates;  // [num_slices, kSliceCapacity]
  const SliceInfo* slices;   // [num_slices]
  uint32 num_slices;
  Order order;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (uint32 slice = threadIdx.x / kWarpSize; slice < num_slices;
         slice += kRowThreads / kWarpSize) {
      const uint32 count = slices[slice].count;
      const uint64* list = candidates + static_cast<int64>(slice) * kSliceCapacity;
      for (uint32 i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
        visit(list[i], order.value(list[i]));
      }
    }
  }
};

__device__ __forceinline__ CandidateSource candidates_of(const Scratch& scratch, uint32 row,
                                                         uint32 vocab, const Order& order) {
  const uint32 num_slices = num_slices_of(vocab);
  const int64 first = static_cast<int64>(row) * num_slices;
  return {scratch.candidates + first * kSliceCapacity,
          scratch.slices ? scratch.slices + first : nullptr, num_slices, order};
}

// Memory of a row for a list of its elements, when its candidates are done with.
__device__ __forceinline__ uint64* list_of(const Scratch& scratch, uint32 row, uint32 vocab) {
  return scratch.candidates + static_cast<int64>(row) * num_slices_of(vocab) * kSliceCapacity;
}
__device__ __forceinline__ uint32 list_capacity(uint32 vocab) {
  return num_slices_of(vocab) * kSliceCapacity;
}

// The least key down to which a row's lists are complete; false when one has overflowed, or
// nothing was collected.
__device__ __forceinline__ bool complete_from(const CandidateSource& source, uint32& bound,
                                              BlockScratch& scratch) {
  if (!source.slices) return false;
  uint32 mine = 0;
  bool overflow = false;
  for (uint32 i = threadIdx.x; i < source.num_slices; i += kRowThreads) {
    const SliceInfo info = source.slices[i];
    overflow |= info.count == kOverflow;
    mine = mine > info.bound ? mine : info.bound;
  }
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint32 other = __shfl_xor_sync(kFullWarp, mine, offset);
    mine = mine > other ? mine : other;
  }
  if (threadIdx.x % kWarpSize == 0) scratch.sums[threadIdx.x / kWarpSize] = mine;
  overflow = __syncthreads_or(overflow);
  bound = 0;
  for (uint32 i = 0; i < kRowThreads / kWarpSize; ++i) {
    const uint32 other = static_cast<uint32>(scratch.sums[i]);
    bound = bound > other ? bound : other;
  }
  __syncthreads();
  return !overflow;
}

}  // namespace ridgeline
