// output = activation(input[..., :hidden]) * input[..., hidden:], float32 inside, rounded once to
// Q: T, or 8 bits after a division by a scale.
//
// input [num_outer, num_inner, 2 * hidden] of T, output [num_outer, num_inner, hidden] of Q, with
// any strides but a last one of 1. kVec elements move at once: 16 bytes of input, or 1 element when
// a pointer, a stride or hidden does not allow that. A thread makes one vector of the output, or
// half of one. All SMs. Launch: kGatedThreads, range_plan(). Limit: num_rows and hidden below 2^31.
#pragma once

#include "activation/functions.cuh"
#include "activation/params.h"
#include "common/arch.cuh"
#include "common/pdl.cuh"
#include "common/quantized.cuh"
#include "common/vec.cuh"

namespace ridgeline {

// Makes one vector of the output, from so many elements into both tensors.
template <class T, int kVec, class Activation, class Q>
__device__ __forceinline__ void gate_vector(const GatedParams& params, int64 from, int64 to) {
  constexpr bool kExact = sizeof(T) == 4;
  constexpr bool kQuantizes = sizeof(Q) == 1;
  const T* source = static_cast<const T*>(params.input) + from;
  pdl_wait();
  // Why not load_once: at 16,384 rows plain loads took 326 us, loads that pass L1 by 338 (H200).
  const Vec<T, kVec> gate = load<kVec>(source);
  const Vec<T, kVec> value = load<kVec>(source + params.hidden);
  float factor = 1.0f;
  if (kQuantizes) {
    factor = reciprocal(params.scale != nullptr ? *params.scale : params.scale_value);
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
  store(static_cast<Q*>(params.output) + to, result);
}

// A compile-time number as an argument.
template <int kNumber>
struct Size {
  static constexpr int kValue = kNumber;
};

template <class T, int kVec, class Activation, class Q = T>
__global__ void __launch_bounds__(kGatedThreads, kThreadsOfSm / kGatedThreads)
    gated(const __grid_constant__ GatedParams params) {
  uint32 vec = blockIdx.x * kGatedThreads + threadIdx.x;
  uint32 row = blockIdx.y;
  // Why apart: the fewer instructions before the loads, the better for few rows.
  if (params.ranges.are_rows) {
    const uint32 vecs_per_row = params.ranges.vecs_per_row.divisor;
    if (vec >= vecs_per_row) return;
    const auto gate = [&](auto size) {
      constexpr int kSize = decltype(size)::kValue;
      gate_vector<T, kSize, Activation, Q>(params, row * params.input_stride + vec * kSize,
                                           (int64{row} * vecs_per_row + vec) * kSize);
    };
    if (kVec > 1 && params.halves) {
      gate(Size<(kVec + 1) / 2>{});
    } else {
      gate(Size<kVec>{});
    }
    return;
  }
  if (!params.ranges.find(blockIdx.y, vec, row)) return;
  const int64 column = int64{vec} * kVec;
  const RowStrides strides{params.input_outer_stride, params.input_stride};
  gate_vector<T, kVec, Activation, Q>(
      params, row_offset(params.num_inner, strides, row) + column,
      row_offset(params.num_inner, params.output_strides, row) + column);
}

}  // namespace ridgeline
