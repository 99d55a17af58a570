#include "runtime/overlap.h"

#include <algorithm>

namespace ridgeline {
namespace {

// The bytes from a tensor's first element to the end of its last.
struct Extent {
  uintptr_t begin;
  uintptr_t end;

  explicit Extent(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    end = begin + static_cast<uintptr_t>(last + 1) * tensor.element_size();
  }
  bool holds_only(const Tensor& tensor) const {
    return end - begin == static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  }
};

}  // namespace

void check_writable(const Arg& arg) {
  if (arg.tensor.numel() == 0) return;
  for (int64_t i = 0; i < arg.tensor.dim(); ++i) {
    if (arg.tensor.size(i) <= 1 || arg.tensor.stride(i) != 0) continue;
    const auto strides = arg.tensor.strides();
    fail(arg.op, arg.name, "a tensor whose elements are distinct, since it is written",
         "strides " + shape_text({strides.data(), strides.size()}) + " (an expanded view)",
         "Call .contiguous() on it first");
  }
}

void check_distinct(const Arg& arg, const Arg& as) {
  if (arg.tensor.numel() == 0 || as.tensor.numel() == 0) return;
  const Extent a(arg.tensor), b(as.tensor);
  if (a.begin >= b.end || b.begin >= a.end) return;
  if (a.begin != b.begin && !(a.holds_only(arg.tensor) && b.holds_only(as.tensor))) return;
  fail(arg.op, arg.name,
       std::string("memory of its own, since it is written beside '") + as.name + "'",
       std::string("a tensor that overlaps '") + as.name + "'", "Pass a .clone() of one of them");
}

void check_out(const Arg& out, const Arg& input) {
  const auto strides = out.tensor.strides(), as = input.tensor.strides();
  const bool same = out.tensor.const_data_ptr() == input.tensor.const_data_ptr() &&
                    std::equal(strides.begin(), strides.end(), as.begin(), as.end());
  if (!same) check_distinct(out, input);
}

}  // namespace ridgeline
