// Uninitialised tensors from torch's caching allocator.
#pragma once

#include <initializer_list>

#include "runtime/tensor.h"

namespace ridgeline {

// A contiguous tensor on the device of `like`. Why not torch::stable::new_empty: that looks the
// operator up by name in every call, a microsecond that this entry point does not take.
Tensor empty(const Tensor& like, std::span<const int64_t> shape, Dtype dtype);

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, Dtype dtype) {
  return empty(like, std::span(shape.begin(), shape.size()), dtype);
}

// A contiguous tensor of the shape and dtype of `like`.
inline Tensor empty_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return empty(like, {sizes.data(), sizes.size()}, like.scalar_type());
}

}  // namespace ridgeline
