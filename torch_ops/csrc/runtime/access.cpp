#include "runtime/access.h"

#include <algorithm>

namespace ridgeline {

int access_width(std::initializer_list<const Arg*> tensors,
                 std::initializer_list<int64_t> lengths) {
  const auto wide =
      static_cast<int>(kVectorBytes / static_cast<size_t>((*tensors.begin())->element_size()));
  const bool fits =
      std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n % wide == 0; }) &&
      std::all_of(tensors.begin(), tensors.end(), [&](const Arg* arg) {
        return !arg ||
               is_aligned(*arg, std::min<int64_t>(kVectorBytes, wide * arg->element_size()));
      });
  return fits ? wide : 1;
}

int access_width(std::initializer_list<const Tensor*> tensors,
                 std::initializer_list<int64_t> lengths) {
  int width = kVectorBytes;
  for (const Tensor* tensor : tensors) {
    const Arg arg("", "", *tensor);
    width = std::min(width, access_width({&arg}, lengths));
  }
  return width;
}

}  // namespace ridgeline
