// output = input * rsqrt(mean(input^2) + eps) * (weight + offset) over the last dimension; float32
// inside, rounded once to Q: T, or 8 bits after a division by a scale.
//
// input and output [num_outer, num_inner, hidden] of T and Q, with any strides but a last one of 1;
// weight [hidden] of W (T or float). kVec elements move at once: 16 bytes of input, or 1 element
// when a pointer, a stride or hidden does not allow that. Who owns which part of a row:
// common/row_pass.cuh. Launch: row_plan() threads, ceil(num_rows / rows_per_block) blocks. All SMs;
// hidden is any number from 1. Limit: num_rows below 2^31; squares overflow float32 beyond 1.8e19.
#pragma once

#include "norm/pass.cuh"

namespace ridgeline {

template <class T, class W, int kVec, class Q = T>
__global__ void __maxnreg__((kRmsnormRegisters<T, W, Q>))
    rmsnorm(const __grid_constant__ NormParams params) {
  constexpr int kSlots = rmsnorm_slots(sizeof(Q) == 1, sizeof(W) > sizeof(T));
  run_pass<NormPass<InputRow<T, kVec>, Weight<W, kVec>, Q, kVec>, kSlots>(params);
}

}  // namespace ridgeline
