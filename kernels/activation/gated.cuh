// output = activation(input[..., :hidden]) * input[..., hidden:], float32 inside, rounded once to
// Q: T, or 8 bits after a division by a scale.
//
// input [num_outer, num_inner, 2 * hidden] of T, output [num_outer, num_inner, hidden] of Q, with
// any strides but a last one of 1. kVec elements move at once: 16 bytes of input, or 1 element when
// a pointer, a stride or hidden does not allow that. A thread makes one vector of the output. All
// SMs. Launch: gated_threads(), range_plan(). Limit: num_rows and hidden below 2^31.
#pragma once

#include "activation/functions.cuh"
#include "activation/params.h"
#include "common/arch.cuh"
#include "common/pdl.cuh"
#include "common/quantized.cuh"
#include "common/vec.cuh"

namespace ridgeline {

template <class T, int kVec, class Activation, class Q = T>
__global__ void __launch_bounds__(gated_threads(sizeof(Q) == 1),
                                  kThreadsOfSm / gated_threads(sizeof(Q) == 1))
    gated(const __grid_constant__ GatedParams params) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr bool kQuantizes = sizeof(Q) == 1;
  const T* input = static_cast<const T*>(params.input);
  Q* output = static_cast<Q*>(params.output);
  uint32 vec = blockIdx.x * gated_threads(kQuantizes) + threadIdx.x;
  uint32 row;
  if (!params.ranges.find(blockIdx.y, vec, row)) return;
  const int64 column = int64{vec} * kVec;
  const T* source = input + row_offset(params.num_inner, params.input_strides, row) + column;

  pdl_wait();
  // Why not load_once: at 16,384 rows plain loads took 326 us, loads that pass L1 by 338 (H200).
  const Vec<T, kVec> gate = load<kVec>(source);
  const Vec<T, kVec> value = load<kVec>(source + params.hidden);
  float factor = 1.0f;
  if (kQuantizes) {
    factor = reciprocal(params.scale.given != nullptr ? *params.scale.given : params.scale.value);
  }
  pdl_launch_dependents();

  float gates[kVec], values[kVec];
  gate.to_floats(gates);
  value.to_floats(values);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    values[j] *= Activation::template apply<kExact>(gates[j]);
    if (kQuantizes) values[j] *= factor;
  }
  Vec<Q, kVec> result;
  result.from_floats(values);
  // Why not a streaming store: the down projection reads the output next, from L2 when it fits.
  store(output + row_offset(params.num_inner, params.output_strides, row) + column, result);
}

}  // namespace ridgeline
