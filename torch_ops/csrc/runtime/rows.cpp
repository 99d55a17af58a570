#include "runtime/rows.h"

#include <algorithm>
#include <span>
#include <string>
#include <vector>

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
