// What the gated activations are told, and how the work is cut. Shared by the kernels and the host.
#pragma once

#include "common/quant_scale.h"
#include "common/ranges.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

// Threads of a block, one vector each. Why more for 8-bit outputs: a block that lets the next
// kernel start takes an H200 1.2 ns (common/pdl.cuh), the blocks of 128 of 16,384 rows of 2 *
// 14,336 284 us; memory needs 268. Else, measured there: with two or four vectors a thread, or
// larger blocks, no size gains more than 1%, and the smallest lose.
constexpr uint32 gated_threads(bool quantizes) {
  return quantizes ? 256 : 128;
}

// What the loads wait for comes first: constants are fetched in lines of 64 bytes.
struct GatedParams {
  const void* input;  // [num_outer, num_inner, 2 * hidden], T: the gate, then what it multiplies
  uint32 hidden;      // below 2^31
  Ranges ranges;      // of the output
  Divider num_inner;  // rows of the inner dimension; num_rows when all rows have one stride
  RowStrides input_strides;
  RowStrides output_strides;
  void* output;      // [num_outer, num_inner, hidden], T or 8-bit numbers
  QuantScale scale;  // of 8-bit outputs: given, one for all
};

}  // namespace ridgeline
