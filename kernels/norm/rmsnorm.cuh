// output = input * rsqrt(mean(input^2) + eps) * weight over the last dimension; float32 inside,
// rounded once.
//
// input and output [num_outer, num_inner, hidden] of T, with any strides but a last one of 1;
// weight [hidden] of W (T or float). kVec elements move at once: 16 bytes, or 1 element when a
// pointer, a stride or hidden does not allow that. Who owns which part of a row: rms.cuh. Launch:
// norm_plan() threads, ceil(num_rows / rows_per_block) blocks. All SMs; hidden is any number
// from 1. Limit: num_rows below 2^31; squares overflow float32 beyond 1.8e19.
#pragma once

#include "norm/rms.cuh"

namespace ridgeline {

template <class T, int kVec>
struct RmsnormRow {
  using Vector = Vec<T, kVec>;
  using Fetched = Vector;
  const T* input;
  T* output;

  __device__ __forceinline__ RmsnormRow() {}
  __device__ __forceinline__ RmsnormRow(const RmsnormParams& params, uint32 row)
      : input(static_cast<const T*>(params.input) +
              row_offset(params.shape.num_inner, params.input_strides, row)),
        output(static_cast<T*>(params.output) +
               row_offset(params.shape.num_inner, params.output_strides, row)) {}
  __device__ __forceinline__ Fetched fetch(uint32 vec_idx) const {
    return load_once<kVec>(input + vec_idx * kVec);
  }
  __device__ __forceinline__ Vector take(const Fetched& fetched, uint32) const { return fetched; }
  __device__ __forceinline__ Vector reload(uint32 vec_idx) const {
    return load_once<kVec>(input + vec_idx * kVec);
  }
  // Why not a streaming store: the next operator reads the output, from L2 when it fits.
  __device__ __forceinline__ void store(uint32 vec_idx, const Vector& y) const {
    ridgeline::store(output + vec_idx * kVec, y);
  }
};

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kNormMaxThreads)
    rmsnorm(const __grid_constant__ RmsnormParams params) {
  normalize<RmsnormRow<T, kVec>, W, kVec>(params);
}

}  // namespace ridgeline
