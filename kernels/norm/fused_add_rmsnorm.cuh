// residual += input; input = residual * rsqrt(mean(residual^2) + eps) * weight, both in place.
//
// The sum is rounded to T, as it is stored, before it is normalised: the next layer, which reads
// the residual, and this norm see the same number. input and residual [num_outer, num_inner,
// hidden] of T, weight [hidden] of W (T or float); float32 inside. Layouts, ownership, launch and
// limits as in rmsnorm.cuh.
#pragma once

#include "norm/rms.cuh"

namespace ridgeline {

template <class T, int kVec>
struct FusedAddRmsnormRow {
  using Vector = Vec<T, kVec>;
  struct Fetched {
    Vector input;
    Vector residual;
  };
  T* input;
  T* residual;

  __device__ __forceinline__ FusedAddRmsnormRow() {}
  __device__ __forceinline__ FusedAddRmsnormRow(const FusedAddRmsnormParams& params, uint32 row)
      : input(static_cast<T*>(params.input) +
              row_offset(params.shape.num_inner, params.input_strides, row)),
        residual(static_cast<T*>(params.residual) +
                 row_offset(params.shape.num_inner, params.residual_strides, row)) {}
  __device__ __forceinline__ Fetched fetch(uint32 vec_idx) const {
    Fetched fetched;
    fetched.input = load_once<kVec>(input + vec_idx * kVec);
    fetched.residual = load_once<kVec>(residual + vec_idx * kVec);
    return fetched;
  }
  __device__ __forceinline__ Vector take(const Fetched& fetched, uint32 vec_idx) const {
    float sums[kVec], inputs[kVec];
    fetched.residual.to_floats(sums);
    fetched.input.to_floats(inputs);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += inputs[i];
    Vector sum;
    sum.from_floats(sums);
    ridgeline::store(residual + vec_idx * kVec, sum);
    return sum;
  }
  // The thread that stored the sum reads it.
  __device__ __forceinline__ Vector reload(uint32 vec_idx) const {
    return load<kVec>(residual + vec_idx * kVec);
  }
  __device__ __forceinline__ void store(uint32 vec_idx, const Vector& y) const {
    ridgeline::store(input + vec_idx * kVec, y);
  }
};

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kNormMaxThreads)
    fused_add_rmsnorm(const __grid_constant__ FusedAddRmsnormParams params) {
  normalize<FusedAddRmsnormRow<T, kVec>, W, kVec>(params);
}

}  // namespace ridgeline
