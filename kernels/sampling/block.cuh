// Words of a block of kRowThreads (or kSoftmaxThreads) threads: reductions, and the place where a
// running sum passes a number.
#pragma once

#include "common/reduce.cuh"
#include "sampling/order.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

// Shared memory of the functions below; they synchronise before they return.
struct BlockScratch {
  uint64 sums[32];  // or minima
  uint32 keys[32];
};

__device__ __forceinline__ uint64 block_total(uint64 x, BlockScratch& scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) scratch.sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const uint32 lane = threadIdx.x % kWarpSize;
  x = warp_sum(lane < blockDim.x / kWarpSize ? scratch.sums[lane] : uint64{0});
  __syncthreads();
  return x;
}

__device__ __forceinline__ uint32 block_max(uint32 x, BlockScratch& scratch) {
  x = warp_max(x);
  if (threadIdx.x % kWarpSize == 0) scratch.keys[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const uint32 lane = threadIdx.x % kWarpSize;
  x = warp_max(scratch.keys[lane < blockDim.x / kWarpSize ? lane : 0]);
  __syncthreads();
  return x;
}

__device__ __forceinline__ uint32 block_min(uint32 x, BlockScratch& scratch) {
  return ~block_max(~x, scratch);
}

__device__ __forceinline__ uint64 block_min(uint64 x, BlockScratch& scratch) {
  const auto warp_min = [](uint64 least) {
#pragma unroll
    for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const uint64 other = __shfl_xor_sync(kFullWarp, least, offset);
      least = least < other ? least : other;
    }
    return least;
  };
  x = warp_min(x);
  if (threadIdx.x % kWarpSize == 0) scratch.sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const uint32 lane = threadIdx.x % kWarpSize;
  x = warp_min(scratch.sums[lane < blockDim.x / kWarpSize ? lane : 0]);
  __syncthreads();
  return x;
}

// The sum of `mine` over the threads before this one.
__device__ __forceinline__ uint64 sum_before(uint64 mine, BlockScratch& scratch) {
  const uint32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64 inclusive = mine;
#pragma unroll
  for (uint32 offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64 other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == kWarpSize - 1) scratch.sums[warp] = inclusive;
  __syncthreads();
  const uint64 before = warp_sum(lane < warp ? scratch.sums[lane] : uint64{0});
  __syncthreads();
  return before + inclusive - mine;
}

// What all segments of a row come to.
struct RowSummary {
  float max;
  uint64 mass;
  bool valid;
};

// Every warp for itself.
template <class Kind>
__device__ __forceinline__ RowSummary summarize(const SegmentStats* segments, uint32 num_segments,
                                                float rate) {
  const uint32 lane = threadIdx.x % kWarpSize;
  float max = Kind::padding();
  bool bad = false;
#pragma unroll 4
  for (uint32 i = lane; i < num_segments; i += kWarpSize) {
    const float segment_max = segments[i].max;
    bad |= segment_max != segment_max;
    max = fmaxf(max, segment_max);
  }
  bad = __any_sync(kFullWarp, bad);
  max = warp_max(max);
  const typename Kind::Weigher weigher = Kind::weigher(max, rate);
  uint64 mass = 0;
#pragma unroll 4
  for (uint32 i = lane; i < num_segments; i += kWarpSize) {
    const SegmentStats stats = segments[i];
    mass += scaled_mass(stats.mass, Kind::weigher(stats.max, rate).scale_in(weigher));
  }
  mass = warp_sum(mass);
  return {max, mass, !bad && mass > 0};
}

// The same, by the block together.
template <class Kind>
__device__ __forceinline__ RowSummary summarize(const SegmentStats* segments, uint32 num_segments,
                                                float rate, BlockScratch& scratch) {
  SegmentStats first{Kind::padding(), 0, 0};
  if (threadIdx.x < num_segments) first = segments[threadIdx.x];
  uint32 key = key_of(first.max);
  for (uint32 i = threadIdx.x + blockDim.x; i < num_segments; i += blockDim.x) {
    const uint32 other = key_of(segments[i].max);
    key = key > other ? key : other;
  }
  key = block_max(key, scratch);
  if (key > key_of(kInfinity)) return {__uint_as_float(0x7fffffffu), 0, false};
  const float max = value_of(key);
  const typename Kind::Weigher weigher = Kind::weigher(max, rate);
  const auto mass_of_segment = [&](const SegmentStats& stats) {
    return scaled_mass(stats.mass, Kind::weigher(stats.max, rate).scale_in(weigher));
  };
  uint64 mass = mass_of_segment(first);
  for (uint32 i = threadIdx.x + blockDim.x; i < num_segments; i += blockDim.x) {
    mass += mass_of_segment(segments[i]);
  }
  mass = block_total(mass, scratch);
  return {max, mass, mass > 0};
}

}  // namespace ridgeline
