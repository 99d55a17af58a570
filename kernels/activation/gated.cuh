// output = activation(input[..., :hidden]) * input[..., hidden:], float32 inside, rounded once.
//
// input [num_outer, num_inner, 2 * hidden], output [num_outer, num_inner, hidden] of T, with any
// strides but a last one of 1. kVec elements move at once: 16 bytes, or 1 element when a pointer, a
// stride or hidden does not allow that. Block x owns kGatedThreads * kGatedItems neighbouring
// vectors of the output, thread t vectors t and t + kGatedThreads of them. All SMs. Launch:
// gated_plan(). Limit: num_rows and hidden below 2^31.
#pragma once

#include "activation/functions.cuh"
#include "activation/params.h"
#include "common/pdl.cuh"
#include "common/vec.cuh"

namespace ridgeline {

template <class T, int kVec, class Activation>
__global__ void __launch_bounds__(kGatedThreads) gated(const __grid_constant__ GatedParams params) {
  constexpr bool kExact = sizeof(T) == 4;
  const T* input = static_cast<const T*>(params.input);
  T* output = static_cast<T*>(params.output);
  const uint32 first_row = blockIdx.y * params.rows_per_range;
  const uint32 first_vec = blockIdx.x * (kGatedThreads * kGatedItems) + threadIdx.x;

  pdl_wait();
  // Four 16-byte loads in flight a thread keep the memory busy at half of a full SM's threads.
  Vec<T, kVec> gate[kGatedItems];
  Vec<T, kVec> value[kGatedItems];
  int64 output_offset[kGatedItems];
  bool valid[kGatedItems];
#pragma unroll
  for (uint32 i = 0; i < kGatedItems; ++i) {
    const uint32 vec = first_vec + i * kGatedThreads;
    const uint32 row_in_range = params.vecs_per_row.quotient(vec);
    const uint32 row = first_row + row_in_range;
    valid[i] = vec < params.vecs_per_range && row < params.num_rows;
    if (!valid[i]) continue;
    const int64 column = int64{vec - row_in_range * params.vecs_per_row.divisor} * kVec;
    const T* source = input + row_offset(params.num_inner, params.input_strides, row) + column;
    gate[i] = load_once<kVec>(source);
    value[i] = load_once<kVec>(source + params.hidden);
    output_offset[i] = row_offset(params.num_inner, params.output_strides, row) + column;
  }
  pdl_launch_dependents();

#pragma unroll
  for (uint32 i = 0; i < kGatedItems; ++i) {
    if (!valid[i]) continue;
    float gates[kVec], values[kVec];
    gate[i].to_floats(gates);
    value[i].to_floats(values);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] *= Activation::template apply<kExact>(gates[j]);
    Vec<T, kVec> result;
    result.from_floats(values);
    // Why not a streaming store: the down projection reads the output next, from L2 when it fits.
    store(output + output_offset[i], result);
  }
}

}  // namespace ridgeline
