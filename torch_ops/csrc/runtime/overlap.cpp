#include "runtime/overlap.h"

#include <algorithm>

namespace ridgeline {
namespace {

// The bytes from a tensor's first element to the end of its last.
struct Extent {
  uintptr_t begin;
  uintptr_t end;

  explicit Extent(const Arg& arg) {
    int64_t last = 0;
    for (size_t i = 0; i < arg.sizes.size(); ++i) last += (arg.sizes[i] - 1) * arg.strides[i];
    begin = reinterpret_cast<uintptr_t>(arg.data);
    end = begin + static_cast<uintptr_t>((last + 1) * arg.element_size());
  }
  bool holds_only(const Arg& arg) const {
    return end - begin == static_cast<uintptr_t>(arg.numel() * arg.element_size());
  }
};

}  // namespace

void check_writable(const Arg& arg) {
  if (arg.numel() == 0) return;
  for (size_t i = 0; i < arg.sizes.size(); ++i) {
    if (arg.sizes[i] <= 1 || arg.strides[i] != 0) continue;
    fail(arg.op, arg.name, "a tensor whose elements are distinct, since it is written",
         "strides " + shape_text(arg.strides) + " (an expanded view)",
         "Call .contiguous() on it first");
  }
}

void check_distinct(const Arg& arg, const Arg& as) {
  if (arg.numel() == 0 || as.numel() == 0) return;
  const Extent a(arg), b(as);
  if (a.begin >= b.end || b.begin >= a.end) return;
  if (a.begin != b.begin && !(a.holds_only(arg) && b.holds_only(as))) return;
  fail(arg.op, arg.name,
       std::string("memory of its own, since it is written beside '") + as.name + "'",
       std::string("a tensor that overlaps '") + as.name + "'", "Pass a .clone() of one of them");
}

void check_out(const Arg& out, const Arg& input) {
  const bool same = out.data == input.data && std::ranges::equal(out.strides, input.strides);
  if (!same) check_distinct(out, input);
}

}  // namespace ridgeline
