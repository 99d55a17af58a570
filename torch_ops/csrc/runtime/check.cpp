#include "runtime/check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ridgeline {
namespace {

std::string join(std::span<const std::string> words) {
  std::string out;
  for (size_t i = 0; i < words.size(); ++i) {
    out += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i];
  }
  return out;
}

}  // namespace

void fail(const char* op, const char* arg, const std::string& expected, const std::string& got,
          const std::string& way_out) {
  throw std::runtime_error(std::string("ridgeline.") + op + ": argument '" + arg + "': expected " +
                           expected + ", got " + got + ". " + way_out);
}

void not_yet(const char* op, const char* arg, const std::string& got) {
  throw std::runtime_error(std::string("ridgeline.") + op + ": argument '" + arg + "': " + got +
                           " is not supported yet. Leave it at its default, or apply it outside "
                           "the call.");
}

Arg::Arg(const char* op, const char* name, const Tensor& tensor)
    : op(op), name(name), tensor(tensor), dtype(dtype_of(tensor)), gpu(-1) {
  const auto all_sizes = tensor.sizes();
  int64_t* all_strides = nullptr;
  if (aoti_torch_get_strides(tensor.get(), &all_strides) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch gave no strides of a tensor");
  }
  sizes = {all_sizes.data(), all_sizes.size()};
  strides = {all_strides, all_sizes.size()};
  data = tensor.const_data_ptr();
  if (tensor.is_cuda()) gpu = tensor.get_device_index();
}

int64_t Arg::numel() const {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

Dtype dtype_of(const Tensor& tensor) {
  static std::array<std::atomic<int>, 64> known{};  // by torch's number; one more than the dtype
  int32_t number = -1;
  if (aoti_torch_get_dtype(tensor.get(), &number) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch gave no dtype of a tensor");
  }
  const auto place = static_cast<size_t>(number);
  if (place >= known.size()) return tensor.scalar_type();
  int found = known[place].load(std::memory_order_relaxed);
  if (found == 0) {
    found = static_cast<int>(tensor.scalar_type()) + 1;
    known[place].store(found, std::memory_order_relaxed);
  }
  return static_cast<Dtype>(found - 1);
}

int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::Double:
    case Dtype::Long:
      return 8;
    case Dtype::Float:
    case Dtype::Int:
      return 4;
    case Dtype::Half:
    case Dtype::BFloat16:
    case Dtype::Short:
      return 2;
    default:
      return 1;
  }
}

std::string dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::Half:
      return "torch.float16";
    case Dtype::BFloat16:
      return "torch.bfloat16";
    case Dtype::Float:
      return "torch.float32";
    case Dtype::Double:
      return "torch.float64";
    case Dtype::Int:
      return "torch.int32";
    case Dtype::Long:
      return "torch.int64";
    case Dtype::Short:
      return "torch.int16";
    case Dtype::Char:
      return "torch.int8";
    case Dtype::Byte:
      return "torch.uint8";
    case Dtype::Bool:
      return "torch.bool";
    case Dtype::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case Dtype::Float8_e5m2:
      return "torch.float8_e5m2";
    default:
      return std::string("torch.") + torch::headeronly::toString(dtype);
  }
}

const char* device_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::Half:
      return "__half";
    case Dtype::BFloat16:
      return "__nv_bfloat16";
    case Dtype::Float8_e4m3fn:
      return "__nv_fp8_e4m3";
    case Dtype::Float8_e5m2:
      return "__nv_fp8_e5m2";
    case Dtype::Char:
      return "int8";
    default:
      return "float";
  }
}

std::string device_name(const Tensor& t) {
  return t.is_cuda()  ? "cuda:" + std::to_string(t.get_device_index())
         : t.is_cpu() ? "cpu"
                      : "another kind of device";
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string shape_text(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_text({sizes.data(), sizes.size()});
}

void check_cuda(const Arg& arg) {
  if (arg.gpu >= 0) return;
  fail(arg.op, arg.name, "a tensor on a CUDA device, as another argument is",
       "one on device " + device_name(arg.tensor), "Move all of them to one device");
}

void check_same_device(const Arg& arg, const Arg& as) {
  if (arg.gpu == as.gpu) return;
  fail(arg.op, arg.name, "device " + device_name(as.tensor) + " (that of '" + as.name + "')",
       device_name(arg.tensor), std::string("Move it with .to(") + as.name + ".device)");
}

void check_dtype(const Arg& arg, std::initializer_list<Dtype> allowed) {
  const Dtype dtype = arg.dtype;
  if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end()) return;
  std::vector<std::string> names;
  for (const Dtype d : allowed) names.push_back(dtype_name(d));
  fail(arg.op, arg.name, "dtype " + join(names), dtype_name(dtype),
       "Convert it with .to(" + names.front() + ")");
}

void check_same_dtype(const Arg& arg, const Arg& as) {
  if (arg.dtype == as.dtype) return;
  fail(arg.op, arg.name, "dtype " + dtype_name(as.dtype) + " (that of '" + as.name + "')",
       dtype_name(arg.dtype), std::string("Convert it with .to(") + as.name + ".dtype)");
}

void check_rank(const Arg& arg, std::initializer_list<int64_t> allowed) {
  if (std::find(allowed.begin(), allowed.end(), arg.rank()) != allowed.end()) return;
  std::vector<std::string> ranks;
  for (const int64_t rank : allowed) ranks.push_back(std::to_string(rank));
  fail(arg.op, arg.name, join(ranks) + " dimensions",
       std::to_string(arg.rank()) + " (shape " + shape_text(arg.tensor) + ")",
       "Reshape it as the function's documentation says");
}

void check_shape(const Arg& arg, std::span<const int64_t> shape, const char* meaning) {
  if (std::ranges::equal(arg.sizes, shape)) return;
  fail(arg.op, arg.name, "shape " + shape_text(shape) + " = " + meaning, shape_text(arg.tensor),
       "Pass a tensor of that shape");
}

void check_last_stride(const Arg& arg) {
  if (arg.sizes.back() <= 1 || arg.strides.back() == 1) return;
  fail(arg.op, arg.name, "a last dimension of stride 1",
       "stride " + std::to_string(arg.strides.back()), "Call .contiguous() on it first");
}

bool is_aligned16(const Arg& arg) {
  return is_aligned(arg, int64_t{kVectorBytes});
}

bool is_aligned(const Arg& arg, int64_t num_bytes) {
  if (reinterpret_cast<uintptr_t>(arg.data) % static_cast<uint64_t>(num_bytes) != 0) return false;
  const int64_t bytes = arg.element_size();
  for (size_t dim = 0; dim + 1 < arg.sizes.size(); ++dim) {
    if (arg.sizes[dim] > 1 && arg.strides[dim] * bytes % num_bytes != 0) return false;
  }
  return true;
}

void check_aligned16(const Arg& arg) {
  if (is_aligned16(arg)) return;
  const auto address = reinterpret_cast<uintptr_t>(arg.data);
  fail(arg.op, arg.name, "a base pointer and strides that are multiples of 16 bytes",
       "a pointer " + std::to_string(address % kVectorBytes) + " bytes past one and strides " +
           shape_text(arg.strides) + " of " + std::to_string(arg.element_size()) + "-byte elements",
       "Call .contiguous() on it, or .clone() if it is contiguous already");
}

}  // namespace ridgeline
