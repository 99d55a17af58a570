// Kernels that move bytes and do not look at them come in one version for each number of bytes that
// they move at once: 16, or fewer for views that do not allow that.
#pragma once

#include <array>
#include <bit>
#include <string>
#include <vector>

#include "runtime/catalog.h"
#include "runtime/kernel.h"
#include "runtime/tensor.h"

namespace ridgeline {

inline constexpr std::array kVectorWidths = {16, 8, 4, 2, 1};

// The bytes that all tensors added so far can be moved in at once.
class VectorWidth {
 public:
  // Rows of `length` elements lie in the tensor's last dimension.
  void add(const Tensor& tensor, int64_t length) {
    const auto element = static_cast<uint64_t>(tensor.element_size());
    bits_ |= reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    bits_ |= static_cast<uint64_t>(length) * element;
    for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
      if (tensor.size(dim) > 1) bits_ |= static_cast<uint64_t>(tensor.stride(dim)) * element;
    }
  }

  int bytes() const { return 1 << std::countr_zero(bits_ | 16); }

 private:
  uint64_t bits_ = 0;
};

// The versions of a kernel, as `name(num_bytes)` spells them.
class VectorKernels {
 public:
  explicit VectorKernels(std::string (*name)(int num_bytes)) {
    for (size_t i = 0; i < kVectorWidths.size(); ++i) kernels_[i] = &kernel(name(kVectorWidths[i]));
  }

  Kernel& of(int num_bytes) const {
    return *kernels_[4 - std::countr_zero(static_cast<unsigned>(num_bytes))];
  }

 private:
  std::array<Kernel*, kVectorWidths.size()> kernels_;
};

// Their rows of the core table.
inline void add_vector_rows(std::vector<Row>& rows, const char* op,
                            std::string (*name)(int num_bytes), int block) {
  for (const int num_bytes : kVectorWidths) {
    rows.push_back({.op = op,
                    .kernel = name(num_bytes),
                    .block = block,
                    .why = num_bytes == 16 ? "16-byte accesses"
                                           : "views or sizes that are not multiples of 16 bytes"});
  }
}

}  // namespace ridgeline
