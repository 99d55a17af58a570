// residual += input; output = residual * rsqrt(mean(residual^2) + eps) * (weight + offset).
//
// The sum is rounded to T, as it is stored, before it is normalised: the next layer, which reads
// the residual, and this norm see the same number. output is the input itself, or 8-bit numbers Q
// elsewhere. Types, layouts, ownership, launch and limits as in rmsnorm.cuh.
#pragma once

#include "norm/pass.cuh"

namespace ridgeline {

template <class T, class W, int kVec, class Q = T>
__global__ void __maxnreg__((kFusedAddRegisters<T, W, Q>))
    fused_add_rmsnorm(const __grid_constant__ NormParams params) {
  run_pass<NormPass<SumRow<T, kVec>, Weight<W, kVec>, Q, kVec>>(params);
}

}  // namespace ridgeline
