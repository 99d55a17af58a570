#include "runtime/alloc.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <stdexcept>

namespace ridgeline {
namespace {

constexpr size_t kMaxRank = 64;  // torch's own limit

}  // namespace

OwnedTensor empty_owned(int gpu, std::span<const int64_t> shape, Dtype dtype) {
  if (shape.size() > kMaxRank) throw std::runtime_error("a tensor of more than 64 dimensions");
  std::array<int64_t, kMaxRank> strides;
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  static const int32_t cuda = aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
          torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), cuda, gpu,
          &handle) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch could not allocate a tensor of shape " + shape_text(shape));
  }
  return OwnedTensor(handle);
}

}  // namespace ridgeline
