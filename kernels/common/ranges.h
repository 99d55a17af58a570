// The vectors of a tensor of rows as one list, a thread for each, for kernels that treat every
// vector alone. Shared by the kernels and the host.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// blockIdx.y is a range: so many whole rows that an index of its vectors fits 31 bits.
struct Ranges {
  bool are_rows;  // each is one row, and all rows have one stride: nothing is to be found
  Divider vecs_per_row;
  uint32 num_rows;  // below 2^31
  uint32 rows_per_range;
  uint32 vecs_per_range;  // rows_per_range * vecs_per_row, below 2^31

  // The row that vector `vec` of a range is in; `vec` becomes its place there. False if it is none.
  constexpr bool find(uint32 range, uint32& vec, uint32& row) const {
    if (vec >= vecs_per_range) return false;
    row = range;
    if (rows_per_range > 1) {
      const uint32 row_in_range = vecs_per_row.quotient(vec);
      row = range * rows_per_range + row_in_range;
      if (row >= num_rows) return false;
      vec -= row_in_range * vecs_per_row.divisor;
    }
    return true;
  }
};

struct RangePlan {
  Ranges ranges;
  uint32 grid_x;
  uint32 grid_y;
};

// Ranges are as large as they may be; or single rows, where hardly a thread of their blocks has
// nothing to do, so that no thread has to divide. Wants num_rows and vecs_per_row from 1 to 2^31 -
// 1, and a power of two for vecs_per_block.
constexpr RangePlan range_plan(int64 num_rows, int64 vecs_per_row, uint32 vecs_per_block,
                               bool has_one_stride) {
  constexpr int64 kMaxGridY = 65535;
  const int64 idle = -vecs_per_row & (vecs_per_block - 1);
  const bool by_row = idle * 8 <= vecs_per_row && num_rows <= kMaxGridY;
  const int64 most_rows = by_row ? 1 : 0x7fffffff / vecs_per_row;
  const int64 rows = num_rows < most_rows ? num_rows : most_rows;
  const int64 vecs = rows * vecs_per_row;
  return {{by_row && has_one_stride, make_divider(static_cast<uint32>(vecs_per_row)),
           static_cast<uint32>(num_rows), static_cast<uint32>(rows), static_cast<uint32>(vecs)},
          static_cast<uint32>((vecs + vecs_per_block - 1) / vecs_per_block),
          static_cast<uint32>((num_rows + rows - 1) / rows)};
}

}  // namespace ridgeline
