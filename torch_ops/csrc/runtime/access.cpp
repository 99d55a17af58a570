#include "runtime/access.h"

#include <algorithm>
#include <vector>

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
  std::vector<Arg> args;
  for (const Tensor* t : tensors) args.emplace_back("", "", *t);
  int width = 16;
  for (const Arg& a : args) width = std::min(width, access_width({&a}, lengths));
  return width;
}

}  // namespace ridgeline
