// What the gated activations are told, and how the work is cut. Shared by the kernels and the host.
#pragma once

#include "common/divide.h"
#include "common/quant_scale.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

// Measured on an H200: with two or four vectors a thread, or larger blocks, no size gains more than
// 1%, and the smallest and the largest lose.
constexpr uint32 kGatedThreads = 128;

// What the loads wait for comes first: constants are fetched in lines of 64 bytes.
struct GatedParams {
  const void* input;  // [num_outer, num_inner, 2 * hidden], T: the gate, then what it multiplies
  uint32 hidden;      // below 2^31
  uint32 num_rows;    // below 2^31
  uint32 rows_per_range;  // rows of one blockIdx.y, from gated_plan()
  uint32 vecs_per_range;  // rows_per_range * hidden / kVec, below 2^31
  Divider vecs_per_row;   // hidden / kVec
  Divider num_inner;      // rows of the inner dimension; num_rows when all rows have one stride
  RowStrides input_strides;
  RowStrides output_strides;
  void* output;      // [num_outer, num_inner, hidden], T or 8-bit numbers
  QuantScale scale;  // of 8-bit outputs: given, one for all
};

struct GatedPlan {
  uint32 rows_per_range;
  uint32 vecs_per_range;
  uint32 grid_x;
  uint32 grid_y;
};

// The output is one list of vectors, cut into ranges of whole rows so that an index fits 31 bits;
// or into rows, where these are whole blocks, so that no thread has to divide. Wants num_rows and
// hidden / vec_size from 1 to 2^31 - 1.
constexpr GatedPlan gated_plan(int64 num_rows, int64 hidden, int vec_size) {
  constexpr int64 kMaxGridY = 65535;
  const int64 vecs_per_row = hidden / vec_size;
  const bool by_row = vecs_per_row % kGatedThreads == 0 && num_rows <= kMaxGridY;
  const int64 most_rows = by_row ? 1 : 0x7fffffff / vecs_per_row;
  const int64 rows = num_rows < most_rows ? num_rows : most_rows;
  const int64 vecs = rows * vecs_per_row;
  return {static_cast<uint32>(rows), static_cast<uint32>(vecs),
          static_cast<uint32>((vecs + kGatedThreads - 1) / kGatedThreads),
          static_cast<uint32>((num_rows + rows - 1) / rows)};
}

}  // namespace ridgeline
