// Sums across threads, in an order that depends on the number of threads alone: the same inputs
// give the same bits.
#pragma once

#include "common/types.h"

namespace ridgeline {

constexpr uint32 kWarpSize = 32;
constexpr uint32 kFullWarp = 0xffffffffu;

// kCount sums at once over each aligned group of `width` lanes (a power of two, 32 at most); every
// lane of the group gets the same bits. All 32 lanes of the warp must call it.
template <int kCount>
__device__ __forceinline__ void group_sum(float (&x)[kCount], uint32 width) {
  for (uint32 offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kFullWarp, x[i], offset);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

// Sum over the block (whole warps, 32 of them at most); every thread gets it. `warp_sums` is shared
// memory, one float a warp; between two calls with the same memory the caller must synchronise.
__device__ __forceinline__ float block_sum(float x, float* warp_sums) {
  const uint32 lane = threadIdx.x % kWarpSize;
  const uint32 num_warps = blockDim.x / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) warp_sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  return warp_sum(lane < num_warps ? warp_sums[lane] : 0.0f);
}

}  // namespace ridgeline
