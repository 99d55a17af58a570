#include "runtime/rows.h"

#include <string>

namespace ridgeline {
namespace {

struct Dim {
  int64_t size;
  int64_t stride;
};

}  // namespace

Rows rows_of(const Arg& arg) {
  const size_t last = arg.sizes.size() - 1;
  Rows rows{1, 1, 0, 0, arg.sizes[last]};
  Dim outer{1, 0}, inner{1, 0};  // the leading ones, adjacent ones folded where the strides allow
  int num_dims = 0;
  for (size_t i = 0; i < last; ++i) {
    const Dim dim{arg.sizes[i], arg.strides[i]};
    rows.num_rows *= dim.size;
    if (dim.size == 1) continue;
    if (num_dims > 0 && inner.stride == dim.size * dim.stride) {
      inner = {inner.size * dim.size, dim.stride};
    } else {
      outer = inner;
      inner = dim;
      ++num_dims;
    }
  }
  if (rows.num_rows == 0 || num_dims == 0) return rows;
  if (num_dims > 2) {
    fail(arg.op, arg.name, "leading dimensions that fold into two",
         "shape " + shape_text(arg.sizes) + " with strides " + shape_text(arg.strides),
         "Call .contiguous() on it first");
  }
  rows.num_inner = inner.size;
  rows.inner_stride = inner.stride;
  if (num_dims == 2) rows.outer_stride = outer.stride;
  return rows;
}

std::pair<Rows, Rows> matching_rows(const Arg& a, const Arg& b) {
  Rows first = rows_of(a), second = rows_of(b);
  // One that folds into a single stride is split like the other.
  const auto split_like = [](Rows& rows, const Rows& as, const Arg& arg, const Arg& as_arg) {
    if (rows.num_inner != rows.num_rows) {
      fail(arg.op, arg.name,
           std::string("leading dimensions that fold as those of '") + as_arg.name + "' do",
           "strides that fold otherwise", "Call .contiguous() on it first");
    }
    rows.outer_stride = as.num_inner * rows.inner_stride;
    rows.num_inner = as.num_inner;
  };
  if (first.num_inner > second.num_inner) split_like(first, second, a, b);
  if (second.num_inner > first.num_inner) split_like(second, first, b, a);
  return {first, second};
}

}  // namespace ridgeline
