// Uninitialised tensors from torch's caching allocator.
#pragma once

#include <initializer_list>
#include <memory>

#include "runtime/check.h"

namespace ridgeline {

// A tensor across the stable ABI, without the shared ownership of Tensor, which takes 30 ns.
struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// A contiguous tensor on a CUDA device. Why not torch::stable::new_empty: that looks the
// operator up by name in every call, a microsecond that this entry point does not take.
OwnedTensor empty_owned(int gpu, std::span<const int64_t> shape, Dtype dtype);

inline Tensor empty(int gpu, std::span<const int64_t> shape, Dtype dtype) {
  return Tensor(empty_owned(gpu, shape, dtype).release());
}

inline Tensor empty(int gpu, std::initializer_list<int64_t> shape, Dtype dtype) {
  return empty(gpu, std::span(shape.begin(), shape.size()), dtype);
}

// On the device of a tensor.
inline Tensor empty(const Tensor& like, std::span<const int64_t> shape, Dtype dtype) {
  return empty(like.get_device_index(), shape, dtype);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, Dtype dtype) {
  return empty(like.get_device_index(), shape, dtype);
}

// A contiguous tensor of the shape and dtype of `like`.
inline Tensor empty_like(const Arg& like) {
  return empty(like.gpu, like.sizes, like.dtype);
}

inline Tensor empty_like(const Tensor& like) {
  return empty_like(Arg("", "", like));
}

}  // namespace ridgeline
