// One vocabulary of argument checks. A failed one throws std::runtime_error:
//   ridgeline.<op>: argument '<arg>': expected <expected>, got <got>. <way out>
#pragma once

#include <initializer_list>
#include <span>
#include <string>

#include "runtime/tensor.h"

namespace ridgeline {

inline constexpr size_t kVectorBytes = 16;  // the widest load or store of a thread

[[noreturn]] void fail(const char* op, const char* arg, const std::string& expected,
                       const std::string& got, const std::string& way_out);

// For an argument that later work brings: never ignored.
[[noreturn]] void not_yet(const char* op, const char* arg, const std::string& got);

// An argument with the op and name that messages give it, and what checks and launches ask of it.
// Why kept: each question to the tensor is a call across the stable ABI, 15 ns.
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;
  std::span<const int64_t> sizes;
  std::span<const int64_t> strides;
  const void* data;
  Dtype dtype;
  int gpu;  // index of the CUDA device, -1 on others

  Arg(const char* op, const char* name, const Tensor& tensor);

  int64_t rank() const { return static_cast<int64_t>(sizes.size()); }
  int64_t numel() const;
  int64_t element_size() const { return ridgeline::element_size(dtype); }
};

void check_cuda(const Arg& arg);
void check_same_device(const Arg& arg, const Arg& as);
void check_dtype(const Arg& arg, std::initializer_list<Dtype> allowed);
void check_same_dtype(const Arg& arg, const Arg& as);
void check_rank(const Arg& arg, std::initializer_list<int64_t> allowed);
void check_shape(const Arg& arg, std::span<const int64_t> shape, const char* meaning);
void check_last_stride(const Arg& arg);  // 1, unless the last dimension holds one element or none
void check_aligned16(const Arg& arg);    // base pointer and every stride, in bytes

bool is_aligned16(const Arg& arg);
bool is_aligned(const Arg& arg, int64_t num_bytes);  // base pointer and every stride

}  // namespace ridgeline
