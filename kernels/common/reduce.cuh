// Sums and maxima across threads, in an order that depends on the number of threads alone: the same
// inputs give the same bits.
#pragma once

#include "common/types.h"

namespace ridgeline {

constexpr uint32 kWarpSize = 32;
constexpr uint32 kFullWarp = 0xffffffffu;

struct Sum {
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
// Of numbers that are not negative; NaN counts as none.
struct Largest {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// kCount reductions at once over each aligned group of `width` lanes (a power of two, 32 at most);
// every lane of the group gets the same bits. All 32 lanes of the warp must call it.
template <class Op, int kCount>
__device__ __forceinline__ void group_reduce(float (&x)[kCount], uint32 width) {
  for (uint32 offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = Op::of(x[i], __shfl_xor_sync(kFullWarp, x[i], offset));
    }
  }
}

template <class Op>
__device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x = Op::of(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

// A reduction over the block (whole warps, 32 of them at most) in two steps, between which the
// block synchronises: each warp puts its part, then every thread reads them all.
template <class Op>
__device__ __forceinline__ void put_of_warp(float x, float4 (&parts)[8]) {
  const uint32 num_warps = blockDim.x / kWarpSize;
  x = warp_reduce<Op>(x);
  float* slots = reinterpret_cast<float*>(parts);
  if (threadIdx.x % kWarpSize == 0) slots[threadIdx.x / kWarpSize] = x;
  // Up to 8 warps read 8 slots, more read all.
  const uint32 num_read = num_warps <= 8 ? 8 : 32;
  if (threadIdx.x < num_read - num_warps) slots[num_warps + threadIdx.x] = 0.0f;
}

// Why every thread reads them all: that takes less time than the shuffles of a second reduction.
template <class Op>
__device__ __forceinline__ float of_warps(const float4 (&parts)[8]) {
  const auto of_four = [&](uint32 i) {
    const float4 four = parts[i];
    return Op::of(Op::of(four.x, four.y), Op::of(four.z, four.w));
  };
  float x = Op::of(of_four(0), of_four(1));
  if (blockDim.x > 8 * kWarpSize) {
#pragma unroll
    for (uint32 i = 2; i < 8; i += 2) x = Op::of(x, Op::of(of_four(i), of_four(i + 1)));
  }
  return x;
}

// Every thread gets it. Between two calls with the same memory the caller must synchronise.
template <class Op>
__device__ __forceinline__ float block_reduce(float x, float4 (&parts)[8]) {
  put_of_warp<Op>(x, parts);
  __syncthreads();
  return of_warps<Op>(parts);
}

}  // namespace ridgeline
