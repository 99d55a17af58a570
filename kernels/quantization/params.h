// What the kernels that pack bits and those that quantize are told. Shared by the kernels and the
// host.
#pragma once

#include "common/quant_scale.h"
#include "common/ranges.h"
#include "common/row_plan.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

constexpr uint32 kPackThreads = 256;
constexpr uint32 kScanThreads = 1024;
constexpr uint32 kPackBytes = 64;     // that a warp packs at once
constexpr uint32 kPackRounds = 4;     // times that it does so where there are many
constexpr uint32 kFewSegments = 256;  // up to here each block sums up their bytes

struct PackbitsParams {
  const uint8* x;  // [num_bits]; nonzero is a 1
  uint8* packed;   // [ceil(num_bits / 8)]
  int64 x_stride;  // elements
  int64 num_bits;
  bool big;  // the first bit of a byte is its highest
};

struct SegmentPackbitsParams {
  const uint8* x;       // [num_bits]; nonzero is a 1
  const int32* indptr;  // [num_segments + 1], bits
  int32* new_indptr;    // [num_segments + 1], bytes
  uint8* packed;        // [num_bytes]
  int64 x_stride;       // elements
  uint32 num_bits;      // below 2^31
  uint32 num_segments;
  uint32 num_bytes;   // a multiple of 4, at least what the segments need, below 2^31
  uint32 num_rounds;  // of a warp: 1 or kPackRounds
  bool big;           // the first bit of a byte is its highest
};

constexpr uint32 kFlatThreads = 256;
constexpr uint32 kFlatSlots = 4;  // vectors of a thread that are on their way at once
constexpr uint32 kMaxPartials = 1024;

// Of quantize. A row of `shape` is a group.
struct QuantizeParams {
  const void* input;  // [num_outer, num_inner, num_groups * group_size]
  void* output;       // the same
  RowStrides input_strides;
  RowStrides output_strides;
  QuantScale scale;
  RowShape shape;
  Divider num_groups;  // of a row of the tensors
  int64 group_size;    // elements
};

// The vectors of all rows [num_outer, num_inner, hidden], dealt out to the threads of a grid.
struct FlatRows {
  RowStrides strides;
  uint32 num_rows;       // below 2^31; 0 when rows are empty
  uint32 step_rows;      // all threads of the grid, in rows and
  uint32 step_columns;   // vectors
  Divider vecs_per_row;  // at least 1
  Divider num_inner;     // rows of the inner dimension; num_rows when all rows have one stride
};

struct TensorMaxParams {
  const void* input;  // [num_outer, num_inner, hidden], T
  float* partials;    // [gridDim.x]
  FlatRows rows;
};

struct QuantizeTensorParams {
  const void* input;      // [num_outer, num_inner, hidden], T
  void* output;           // the same, Q, contiguous
  const float* partials;  // [num_partials]
  float* scale;           // [1]
  FlatRows rows;
  uint32 num_partials;  // at most kMaxPartials
};

// Of dequantize: threads of a block, and vectors of a thread. More where a vector is one element:
// blocks of so little work take longer to start than to run. Below kDequantizeFew vectors larger
// blocks of one vector a thread.
constexpr uint32 kDequantizeThreads = 256;
constexpr uint32 dequantize_slots(int vec_size) {
  return vec_size == 1 ? 4 : 2;
}
constexpr uint32 kDequantizeFewThreads = 512;
constexpr int64 kDequantizeFew = 1 << 20;

// What most calls of few vectors need lies in the first 48 bytes, as in GatedParams.
struct DequantizeParams {
  const void* input;    // [num_outer, num_inner, hidden], Q
  void* output;         // [num_outer, num_inner, hidden], T, contiguous
  const float* scales;  // [num_rows * num_groups], or one of stride 0
  int64 stride;         // elements, of the inner dimension
  uint32 scale_stride;  // 0 or 1
  Ranges ranges;        // rows where vectors are few and a row has one scale
  Divider num_inner;    // rows of the inner dimension; num_rows when all rows have one stride
  int64 outer_stride;   // elements
  uint32 num_groups;    // of a row
  Divider vecs_per_group;
};

}  // namespace ridgeline
