#include "runtime/access.h"

#include <algorithm>

namespace ridgeline {

int access_width(std::initializer_list<const Arg*> tensors,
                 std::initializer_list<int64_t> lengths) {
  const auto wide =
      static_cast<int>(kVectorBytes / static_cast<size_t>((*tensors.begin())->element_size()));
  const bool fits =
      std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return n % wide == 0; }) &&
      std::all_of(tensors.begin(), tensors.end(),
                  [](const Arg* arg) { return is_aligned16(*arg); });
  return fits ? wide : 1;
}

}  // namespace ridgeline
