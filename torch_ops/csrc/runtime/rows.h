// A tensor [..., hidden] as rows, for operators that work on its last dimension.
#pragma once

#include <array>
#include <utility>

#include "runtime/check.h"

namespace ridgeline {

// Row r starts at (r / num_inner) * outer_stride + (r % num_inner) * inner_stride elements.
struct Rows {
  int64_t num_rows;
  int64_t num_inner;  // at least 1
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t hidden;

  bool have_one_stride() const { return num_inner == num_rows; }
  // Whether no elements lie between them.
  bool are_one_run() const {
    return num_rows == 1 || (have_one_stride() && inner_stride == hidden);
  }
};

// Folds the leading dimensions into at most two; fails, naming the argument, when their strides
// do not allow that.
Rows rows_of(const Arg& arg);

// Views, whose leading dimensions are alike, as rows with one numbering.
std::pair<Rows, Rows> matching_rows(const Arg& a, const Arg& b);
std::array<Rows, 3> matching_rows(const Arg& a, const Arg& b, const Arg& c);

}  // namespace ridgeline
