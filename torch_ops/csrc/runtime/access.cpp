#include "runtime/access.h"

#include <algorithm>

#include "runtime/check.h"

namespace ridgeline {

int access_width(std::initializer_list<const Tensor*> tensors,
                 std::initializer_list<int64_t> lengths) {
  const size_t element_size = (*tensors.begin())->element_size();
  const auto wide = static_cast<int>(kVectorBytes / element_size);
  const bool fits =
      std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n % wide == 0; }) &&
      std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
        return is_aligned({"", "", *t}, std::min(kVectorBytes, wide * t->element_size()));
      });
  return fits ? wide : 1;
}

int access_width(std::initializer_list<const Arg*> args, int64_t length) {
  const size_t element_size = (*args.begin())->tensor.element_size();
  const auto wide = static_cast<int>(kVectorBytes / element_size);
  const bool fits =
      length % wide == 0 && std::ranges::all_of(args, [&](const Arg* arg) {
        return !arg || is_aligned(*arg, std::min(kVectorBytes, wide * arg->tensor.element_size()));
      });
  return fits ? wide : 1;
}

}  // namespace ridgeline
