// Element-wise kernels come in one version for each element type and width of access: 16 bytes at a
// time, or single elements for views and sizes that do not allow that.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"

namespace ridgeline {

struct Access {
  Dtype dtype;
  int vec_size;  // elements that one load or store moves
};

inline constexpr std::array kAccesses = {
    Access{Dtype::Half, 8},     Access{Dtype::Half, 1},  Access{Dtype::BFloat16, 8},
    Access{Dtype::BFloat16, 1}, Access{Dtype::Float, 4}, Access{Dtype::Float, 1},
};

// The widest access that the addresses and strides of all tensors allow, and that divides every
// one of `lengths` (in elements): 16 bytes of the first tensor, and as many elements of the others.
// Null ones are absent.
int access_width(std::initializer_list<const Arg*> tensors, std::initializer_list<int64_t> lengths);

// The same of tensors that no Arg was made of.
int access_width(std::initializer_list<const Tensor*> tensors,
                 std::initializer_list<int64_t> lengths);

// The versions of a kernel, as `name(access)` spells them.
class AccessKernels {
 public:
  template <class Name>
  explicit AccessKernels(const Name& name) {
    for (size_t i = 0; i < kAccesses.size(); ++i) kernels_[i] = &kernel(name(kAccesses[i]));
  }

  Kernel& of(Dtype dtype, int vec_size) const {
    size_t i = vec_size == 1 ? 1 : 0;
    while (kAccesses[i].dtype != dtype) i += 2;
    return *kernels_[i];
  }

 private:
  std::array<Kernel*, kAccesses.size()> kernels_;
};

// Their rows of the core table.
template <class Name>
void add_access_rows(std::vector<Row>& rows, const char* op, const Name& name, uint32_t block) {
  for (const Access& access : kAccesses) {
    rows.push_back({.op = op,
                    .kernel = name(access),
                    .block = static_cast<int>(block),
                    .why = access.vec_size == 1
                               ? "views or sizes that are not multiples of 16 bytes"
                               : "16-byte accesses"});
  }
}

// What the dispatcher chooses for tensors that allow wide accesses.
template <class Name>
Choice choose_access(const Config& config, const Name& name) {
  const std::string dtype = config.get("dtype", "float16");
  for (const Access& access : kAccesses) {
    if (dtype_name(access.dtype) == "torch." + dtype) return {{name(access)}, {}};
  }
  return {{}, {"dtype " + dtype + ": expected float16, bfloat16 or float32"}};
}

}  // namespace ridgeline
