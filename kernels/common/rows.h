// Rows of a tensor with up to two outer dimensions of any stride. Plain C++17, for host and device.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// Rows are numbered 0 .. num_rows - 1 over [num_outer, num_inner]; strides in elements.
struct RowStrides {
  int64 outer;
  int64 inner;
};

// Elements from the first row to row `row`.
constexpr int64 row_offset(const Divider& num_inner, const RowStrides& strides, uint32 row) {
  // Why a branch: most tensors have one stride for all rows, and loads wait for this address.
  if (row < num_inner.divisor) return row * strides.inner;
  const uint32 outer = num_inner.quotient(row);
  return outer * strides.outer + (row - outer * num_inner.divisor) * strides.inner;
}

}  // namespace ridgeline
