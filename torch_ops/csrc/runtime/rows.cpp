#include "runtime/rows.h"

#include <string>
#include <vector>

namespace ridgeline {
namespace {

struct Dim {
  int64_t size;
  int64_t stride;
};

}  // namespace

Rows rows_of(const Arg& arg) {
  const Tensor& tensor = arg.tensor;
  const int64_t last = tensor.dim() - 1;
  Rows rows{1, 1, 0, 0, tensor.size(last)};
  std::vector<Dim> dims;  // the leading ones, adjacent ones folded where the strides allow
  for (int64_t i = 0; i < last; ++i) {
    const Dim dim{tensor.size(i), tensor.stride(i)};
    rows.num_rows *= dim.size;
    if (dim.size == 1) continue;
    if (!dims.empty() && dims.back().stride == dim.size * dim.stride) {
      dims.back() = {dims.back().size * dim.size, dim.stride};
    } else {
      dims.push_back(dim);
    }
  }
  if (rows.num_rows == 0 || dims.empty()) return rows;
  if (dims.size() > 2) {
    const auto strides = tensor.strides();
    fail(arg.op, arg.name, "leading dimensions that fold into two",
         "shape " + shape_text(tensor) + " with strides " +
             shape_text({strides.data(), strides.size()}),
         "Call .contiguous() on it first");
  }
  rows.num_inner = dims.back().size;
  rows.inner_stride = dims.back().stride;
  if (dims.size() == 2) rows.outer_stride = dims.front().stride;
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
