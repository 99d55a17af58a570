// output = (input - mean) * rsqrt(variance + eps) * weight + bias over the last dimension; float32
// inside, rounded once to Q: T, or 8 bits after a division by a scale.
//
// The variance is the mean of the squared distances from the mean, in a step after the mean's own,
// so that a large mean costs no digits. weight and bias [hidden] of W. Types, layouts, ownership,
// launch and limits as in rmsnorm.cuh.
#pragma once

#include "norm/pass.cuh"

namespace ridgeline {

template <class T, class W, int kVec, class Q = T>
__global__ void __maxnreg__((kLayernormRegisters<T, W, Q>))
    layernorm(const __grid_constant__ NormParams params) {
  run_pass<NormPass<InputRow<T, kVec>, WeightAndBias<W, kVec>, Q, kVec>>(params);
}

// The same for rows of more than kLongRowVecs vectors.
template <class T, class W, int kVec>
__global__ void __maxnreg__((kLongLayernormRegisters<T, W>))
    layernorm_long(const __grid_constant__ NormParams params) {
  run_pass<NormPass<InputRow<T, kVec>, WeightAndBias<W, kVec>, T, kVec>, kLongRowSlots, true>(
      params);
}

}  // namespace ridgeline
