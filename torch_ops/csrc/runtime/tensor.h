// The stable-ABI tensor, and what error messages call its properties.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <span>
#include <string>

namespace ridgeline {

using Tensor = torch::stable::Tensor;
using Dtype = torch::headeronly::ScalarType;

// As Tensor::scalar_type, which compares torch's number of the dtype with that of every other, a
// call each: 30 ns for bfloat16.
Dtype dtype_of(const Tensor& tensor);

int64_t element_size(Dtype dtype);                       // bytes, of the real types
std::string dtype_name(Dtype dtype);                     // "torch.float16"
std::string device_name(const Tensor& t);                // "cuda:0"
std::string shape_text(std::span<const int64_t> shape);  // "[2, 3]"
std::string shape_text(const Tensor& t);

// The element type's name in device code: "__half", "__nv_fp8_e4m3"; "float" for other types.
const char* device_type(Dtype dtype);

}  // namespace ridgeline
