// output = saturate(round(input / scale)), a scale for each group of neighbouring elements of a
// row: given, or max|group| / the largest number of Q, computed and written.
//
// input and output [num_outer, num_inner, num_groups * group_size] of T and Q (fp8 e4m3, fp8 e5m2
// or int8), any strides but a last one of 1; scales [num_outer * num_inner * num_groups]. kVec
// elements move at once: 16 bytes of input, or 1 element when a pointer, a stride or the group does
// not allow that. Who owns which part of a group: common/row_pass.cuh. Launch:
// maxima_plan(group_size). All SMs. Limit: groups below 2^31.
#pragma once

#include "common/arch.cuh"
#include "quantization/groups.cuh"

namespace ridgeline {

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kRowMaxThreads, kThreadsOfSm / kRowMaxThreads)
    quantize(const __grid_constant__ QuantizeParams params) {
  run_pass<GroupPass<T, Q, kVec, Scaling::kDivide>>(params);
}

}  // namespace ridgeline
