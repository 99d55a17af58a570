// The scale of a whole tensor, max|input| / the largest number of Q, in two launches.
//
// tensor_max: input [num_outer, num_inner, hidden] of T, any strides but a last one of 1; a grid of
// at most kMaxPartials blocks walks its vectors (16 bytes, or 1 element) and writes one maximum a
// block. tensor_scale: one block makes the scale of them. NaN counts as nothing. All SMs. Limit:
// rows below 2^31.
#pragma once

#include "common/row_pass.cuh"
#include "quantization/params.h"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kTensorMaxThreads)
    tensor_max(const __grid_constant__ TensorMaxParams params) {
  __shared__ float4 of_warps[8];
  const uint32 thread = blockIdx.x * kTensorMaxThreads + threadIdx.x;
  uint32 row = params.vecs_per_row.quotient(thread);
  uint32 column = thread - row * params.vecs_per_row.divisor;
  float largest = 0.0f;
  while (row < params.num_rows) {
    const T* source = static_cast<const T*>(params.input) +
                      row_offset(params.num_inner, params.input_strides, row) +
                      int64{column} * kVec;
    float values[kVec];
    load<kVec>(source).to_floats(values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) largest = fmaxf(largest, fabsf(values[i]));
    // The vector that lies a whole grid of threads further.
    row += params.step_rows;
    column += params.step_columns;
    if (column >= params.vecs_per_row.divisor) {
      column -= params.vecs_per_row.divisor;
      ++row;
    }
  }
  largest = block_reduce<Largest>(largest, of_warps);
  if (threadIdx.x == 0) params.partials[blockIdx.x] = largest;
}

template <class Q>
__global__ void __launch_bounds__(kMaxPartials)
    tensor_scale(const __grid_constant__ TensorScaleParams params) {
  __shared__ float4 of_warps[8];
  const float partial = threadIdx.x < params.num_partials ? params.partials[threadIdx.x] : 0.0f;
  const float largest = block_reduce<Largest>(partial, of_warps);
  if (threadIdx.x == 0) *params.scale = scale_for(largest, kLargest<Q>);
}

}  // namespace ridgeline
