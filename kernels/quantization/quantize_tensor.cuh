// output = saturate(round(input / scale)), one scale for the whole tensor: max|input| / the largest
// number of Q, in two launches that each read the tensor.
//
// tensor_max: a grid of at most kMaxPartials blocks writes one maximum a block. quantize_tensor,
// behind it: every block makes the scale of these, the first writes it. It walks from the end,
// where tensor_max read last: that part is in L2 still. Layouts: flat.cuh; kVec elements move at
// once: 16 bytes of input, or 1. NaN counts as nothing in the maximum. Launch: kFlatThreads
// threads. All SMs.
#pragma once

#include "common/row_pass.cuh"
#include "common/scaled.cuh"
#include "quantization/flat.cuh"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kFlatThreads)
    tensor_max(const __grid_constant__ TensorMaxParams params) {
  __shared__ float4 of_warps[8];
  const FlatRows& rows = params.rows;
  const T* input = static_cast<const T*>(params.input);
  float largest = 0.0f;
  pdl_launch_dependents();
  for (FlatPlace place(rows); place.exists(rows);) {
    Vec<T, kVec> x[kFlatSlots];
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      x[i].clear();
      if (place.exists(rows)) x[i] = load<kVec>(input + place.strided<kVec>(rows));
      place.advance(rows);
    }
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      float values[kVec];
      x[i].to_floats(values);
#pragma unroll
      for (int j = 0; j < kVec; ++j) largest = fmaxf(largest, fabsf(values[j]));
    }
  }
  largest = block_reduce<Largest>(largest, of_warps);
  if (threadIdx.x == 0) params.partials[blockIdx.x] = largest;
}

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kFlatThreads)
    quantize_tensor(const __grid_constant__ QuantizeTensorParams params) {
  __shared__ float4 of_warps[8];
  const FlatRows& rows = params.rows;
  const T* input = static_cast<const T*>(params.input);
  Q* output = static_cast<Q*>(params.output);
  FlatPlace next(rows);
  Vec<T, kVec> x[kFlatSlots];
  FlatPlace places[kFlatSlots];
  const auto fetch = [&] {
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      places[i] = next.mirrored(rows);
      if (next.exists(rows)) x[i] = load<kVec>(input + places[i].strided<kVec>(rows));
      next.advance(rows);
    }
  };
  fetch();
  pdl_wait();
  float largest = 0.0f;
#pragma unroll
  for (uint32 i = 0; i < kMaxPartials; i += kFlatThreads) {
    const uint32 at = i + threadIdx.x;
    if (at < params.num_partials) largest = fmaxf(largest, __ldcg(params.partials + at));
  }
  largest = block_reduce<Largest>(largest, of_warps);
  const float scale = scale_for(largest, kLargest<Q>);
  const float factor = reciprocal(scale);
  if (blockIdx.x == 0 && threadIdx.x == 0) *params.scale = scale;
  while (true) {
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      // A place before the first row wraps to one behind the last.
      if (places[i].exists(rows)) {
        store(output + places[i].contiguous<kVec>(rows), scaled<Q>(x[i], factor));
      }
    }
    if (!next.exists(rows)) return;
    fetch();
  }
}

}  // namespace ridgeline
