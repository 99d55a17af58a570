// output = input * scale, rounded once, a scale for each group of neighbouring elements of a row or
// one for all.
//
// input [num_outer, num_inner, hidden] of Q (fp8 e4m3, fp8 e5m2 or int8), any strides but a last
// one of 1; output the same of T, contiguous. kVec elements move at once: 16 bytes of output, or 1
// where a pointer, a stride or the group does not allow that. A thread makes dequantize_slots()
// vectors, a block neighbouring ones. Launch: kDequantizeThreads threads, range_plan(). All SMs.
#pragma once

#include "common/pdl.cuh"
#include "common/quantized.cuh"
#include "common/scaled.cuh"
#include "quantization/params.h"

namespace ridgeline {

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize(const __grid_constant__ DequantizeParams params) {
  constexpr uint32 kSlots = dequantize_slots(kVec);
  const Q* input = static_cast<const Q*>(params.input);
  T* output = static_cast<T*>(params.output);
  Vec<Q, kVec> x[kSlots];
  float scales[kSlots];
  T* targets[kSlots];
#pragma unroll
  for (uint32 i = 0; i < kSlots; ++i) {
    uint32 vec = (blockIdx.x * kSlots + i) * kDequantizeThreads + threadIdx.x;
    uint32 row;
    targets[i] = nullptr;
    if (!params.ranges.find(blockIdx.y, vec, row)) continue;
    const int64 column = int64{vec} * kVec;
    x[i] = load<kVec>(input + row_offset(params.num_inner, params.strides, row) + column);
    const int64 group = int64{row} * params.num_groups + params.vecs_per_group.quotient(vec);
    scales[i] = params.scales[group * params.scale_stride];
    targets[i] = output + int64{row} * params.ranges.vecs_per_row.divisor * kVec + column;
  }
  pdl_launch_dependents();
#pragma unroll
  for (uint32 i = 0; i < kSlots; ++i) {
    if (targets[i] != nullptr) store(targets[i], scaled<T>(x[i], scales[i]));
  }
}

}  // namespace ridgeline
