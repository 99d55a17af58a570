// output = input * scale, rounded once, a scale for each group of neighbouring elements of a row or
// one for all.
//
// input [num_outer, num_inner, hidden] of Q (fp8 e4m3, fp8 e5m2 or int8), any strides but a last
// one of 1; output the same of T, contiguous. kVec elements move at once: 16 bytes of output, or 1
// where a pointer, a stride or the group does not allow that. A thread makes dequantize_slots()
// vectors, a block neighbouring ones, or one where they are few. Launch: kDequantizeThreads
// threads, or kDequantizeFewThreads; range_plan(). All SMs. Why it does not let the next kernel
// start early: blocks do so little that 1,024 rows of 4096 took 2% longer for it (H200).
#pragma once

#include "common/quantized.cuh"
#include "common/scaled.cuh"
#include "quantization/params.h"

namespace ridgeline {

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kDequantizeFewThreads)
    dequantize(const __grid_constant__ DequantizeParams params) {
  const Q* input = static_cast<const Q*>(params.input);
  T* output = static_cast<T*>(params.output);
  const uint32 vecs_per_row = params.ranges.vecs_per_row.divisor;
  // Why apart: the fewer instructions before the loads, the better for few rows.
  if (params.ranges.are_rows) {
    const uint32 vec = blockIdx.x * kDequantizeFewThreads + threadIdx.x, row = blockIdx.y;
    if (vec >= vecs_per_row) return;
    const Vec<Q, kVec> x = load<kVec>(input + row * params.stride + vec * kVec);
    const float scale = params.scales[int64{row} * params.scale_stride];
    store(output + (int64{row} * vecs_per_row + vec) * kVec, scaled<T>(x, scale));
    return;
  }
  constexpr uint32 kSlots = dequantize_slots(kVec);
  const RowStrides strides{params.outer_stride, params.stride};
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
    x[i] = load<kVec>(input + row_offset(params.num_inner, strides, row) + column);
    const int64 group = int64{row} * params.num_groups + params.vecs_per_group.quotient(vec);
    scales[i] = params.scales[group * params.scale_stride];
    targets[i] = output + int64{row} * vecs_per_row * kVec + column;
  }
#pragma unroll
  for (uint32 i = 0; i < kSlots; ++i) {
    if (targets[i] != nullptr) store(targets[i], scaled<T>(x[i], scales[i]));
  }
}

}  // namespace ridgeline
