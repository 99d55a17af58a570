// What the norm kernels are told. Shared by the kernels and the host.
#pragma once

#include "common/quant_scale.h"
#include "common/row_plan.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

// Vectors of a row that a thread keeps (row_plan.h). Why four in rmsnorm with 8-bit outputs, whose
// blocks of 1024 threads have registers for them, and for layernorm's long rows: blocks are half as
// large, so that more of them overlap. Measured on an H200: per-token scales of 16,384 rows of 4096
// 51 us, with two 58, but 64 rows or fewer 0.1 us more; layernorm of 4096 rows of 8192 35 us, with
// two 40, but one row of 4096 0.3 us more.
constexpr int rmsnorm_slots(bool quantizes, bool wide_weight) {
  return quantizes && !wide_weight ? 4 : kRowSlots;
}
constexpr int kLongRowSlots = 4;
constexpr int64 kLongRowVecs = 512;  // longer ones are long

// What the first loads wait for comes first: constants are fetched in lines of 64 bytes.
struct NormParams {
  RowShape shape;
  const void* input;  // [num_outer, num_inner, hidden], T
  RowStrides input_strides;
  const void* weight;  // [hidden], W, contiguous
  void* residual;      // as input, T; overwritten with residual + input; null but for a fused add
  RowStrides residual_strides;
  const void* bias;  // [hidden], W, contiguous; null but for layernorm
  void* output;      // as input, T or 8-bit numbers
  RowStrides output_strides;
  QuantScale scale;  // of 8-bit outputs
  float length;      // hidden, the divisor of means
  float eps;
  float weight_offset;  // added to the weights; -0, which changes no weight, or 1
};

}  // namespace ridgeline
