// What the gated activations are told, and how the work is cut. Shared by the kernels and the host.
#pragma once

#include "common/quant_scale.h"
#include "common/ranges.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

// Threads of a block, one vector each. Why so many: a block that lets the next kernel start takes
// an H200 1.2 ns (common/pdl.cuh), the blocks of 128 of 16,384 rows of 2 * 14,336 to 8 bits 284 us;
// memory needs 268.
constexpr uint32 kGatedThreads = 256;

// What most calls need lies in the first 48 bytes: constants are fetched in lines of 64, and 16
// bytes come before.
struct GatedParams {
  const void* input;   // [num_outer, num_inner, 2 * hidden], T: the gate, then what it multiplies
  void* output;        // [num_outer, num_inner, hidden], T or 8-bit numbers
  const float* scale;  // [1] of 8-bit outputs; null: scale_value
  int64 input_stride;  // elements, of the inner dimension
  uint32 hidden;       // below 2^31
  bool halves;         // of vectors, a thread each: where all threads find room at once
  Ranges ranges;       // of the output; rows only where it is contiguous
  float scale_value;
  Divider num_inner;         // rows of the inner dimension; num_rows when all rows have one stride
  int64 input_outer_stride;  // elements
  RowStrides output_strides;
};

}  // namespace ridgeline
