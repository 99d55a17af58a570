#include "runtime/rows.h"

#include <algorithm>
#include <span>
#include <string>

namespace ridgeline {
namespace {

struct Dim {
  int64_t size;
  int64_t stride;
};

// A tensor whose rows fold into a single stride is split like the one that is split most.
void split_alike(std::span<Rows> rows, std::span<const Arg* const> args) {
  const auto least = std::ranges::min_element(rows, {}, &Rows::num_inner);
  const Rows as = *least;
  const Arg& as_arg = *args[least - rows.begin()];
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].num_inner == as.num_inner) continue;
    if (rows[i].num_inner != rows[i].num_rows) {
      fail(args[i]->op, args[i]->name,
           std::string("leading dimensions that fold as those of '") + as_arg.name + "' do",
           "strides that fold otherwise", "Call .contiguous() on it first");
    }
    rows[i].outer_stride = as.num_inner * rows[i].inner_stride;
    rows[i].num_inner = as.num_inner;
  }
}

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
  std::array rows{rows_of(a), rows_of(b)};
  split_alike(rows, std::array{&a, &b});
  return {rows[0], rows[1]};
}

std::array<Rows, 3> matching_rows(const Arg& a, const Arg& b, const Arg& c) {
  std::array rows{rows_of(a), rows_of(b), rows_of(c)};
  split_alike(rows, std::array{&a, &b, &c});
  return rows;
}

}  // namespace ridgeline
