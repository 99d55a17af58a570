// quantize, quantize_with_scale, dequantize: schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quantization/params.h"
#include "runtime/access.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/rows.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;  // groups, and elements of one row
constexpr int64_t kWholeRow = 0, kWholeTensor = -1;    // as group sizes
constexpr const char* kQuantize = "quantization/quantize.cuh:quantize";
constexpr const char* kDequantize = "quantization/dequantize.cuh:dequantize";
constexpr const char* kTensorMax = "quantization/tensor_scale.cuh:tensor_max";
constexpr const char* kTensorScale = "quantization/tensor_scale.cuh:tensor_scale";
constexpr std::array kFormats = {Dtype::Float8_e4m3fn, Dtype::Float8_e5m2, Dtype::Char};

auto quant_name(const char* entry, Dtype format) {
  return [=](const Access& access) {
    return kernel_name(entry, device_type(access.dtype), device_type(format), access.vec_size);
  };
}

std::string max_name(const Access& access) {
  return kernel_name(kTensorMax, device_type(access.dtype), access.vec_size);
}

std::string scale_name(Dtype format) {
  return kernel_name(kTensorScale, device_type(format));
}

// An entry's kernels for each 8-bit type.
class FormatKernels {
 public:
  explicit FormatKernels(const char* entry)
      : kernels_{AccessKernels(quant_name(entry, kFormats[0])),
                 AccessKernels(quant_name(entry, kFormats[1])),
                 AccessKernels(quant_name(entry, kFormats[2]))} {}
  Kernel& of(Dtype format, Dtype dtype, int vec_size) const {
    const auto at = std::ranges::find(kFormats, format) - kFormats.begin();
    return kernels_[static_cast<size_t>(at)].of(dtype, vec_size);
  }

 private:
  std::array<AccessKernels, kFormats.size()> kernels_;
};

std::vector<Row> quantize_rows() {
  std::vector<Row> rows;
  for (const Dtype format : kFormats) {
    for (const char* op : {"quantize", "quantize_with_scale"}) {
      add_access_rows(rows, op, quant_name(kQuantize, format), kRowMaxThreads);
    }
    add_access_rows(rows, "dequantize", quant_name(kDequantize, format), kRowMaxThreads);
    rows.push_back({.op = "quantize",
                    .kernel = scale_name(format),
                    .block = kMaxPartials,
                    .why = "one scale for the whole tensor"});
  }
  add_access_rows(rows, "quantize", max_name, kTensorMaxThreads);
  return rows;
}

Choice quantize_choose(const std::string& op, const Config& config, int) {
  const std::string wanted = config.get("quant_dtype", "float8_e4m3fn");
  for (const Dtype format : kFormats) {
    if (dtype_name(format) != "torch." + wanted) continue;
    return choose_access(config, quant_name(op == "dequantize" ? kDequantize : kQuantize, format));
  }
  return {{}, {"quant_dtype " + wanted + ": expected float8_e4m3fn, float8_e5m2 or int8"}};
}

const RegisterFamily family({{"quantize", "quantize_with_scale", "dequantize"},
                             quantize_rows,
                             quantize_choose});

void check_rows(const Arg& input, std::initializer_list<Dtype> allowed) {
  check_cuda(input);
  check_dtype(input, allowed);
  if (input.rank() == 0) {
    fail(input.op, input.name, "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]");
  }
  check_last_stride(input);
}

void check_format(const char* op, Dtype format) {
  if (std::ranges::find(kFormats, format) != kFormats.end()) return;
  fail(op, "dtype", "torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8", dtype_name(format),
       "Pass one of these");
}

int64_t groups_of_row(const Arg& input, int64_t group_size) {
  const int64_t hidden = input.sizes.back();
  if (group_size <= kWholeRow) return 1;
  if (hidden % group_size != 0) {
    fail(input.op, "granularity", "a divisor of the last dimension, " + std::to_string(hidden),
         std::to_string(group_size), "Pad the tensor, or choose another size of a group");
  }
  return hidden / group_size;
}

// Rows [num_rows, num_groups * group_size] of both tensors through one kernel.
void run_groups(const FormatKernels& kernels, Dtype format, const Arg& input, const Arg& out,
                int64_t num_groups, const QuantScale& scale) {
  const auto [rows, out_rows] = matching_rows(input, out);
  const int64_t all_groups = rows.num_rows * num_groups;
  if (all_groups == 0 || (rows.hidden == 0 && !scale.computed)) return;
  if (all_groups > kMaxCount) {
    fail(input.op, "input", "fewer than 2^31 groups", std::to_string(all_groups), "Split the call");
  }
  const int64_t group_size = rows.hidden / num_groups;
  const Arg& wide = input.dtype == format ? out : input;
  const Arg& narrow = input.dtype == format ? input : out;
  const int vec_size = access_width({&wide, &narrow}, {group_size});
  const RowPlan plan = row_plan(group_size, vec_size);
  const QuantizeParams params{
      .input = input.tensor.const_data_ptr(),
      .output = out.tensor.mutable_data_ptr(),
      .input_strides = {rows.outer_stride, rows.inner_stride},
      .output_strides = {out_rows.outer_stride, out_rows.inner_stride},
      .scale = scale,
      .shape = {static_cast<uint32>(all_groups), static_cast<uint32>(group_size / vec_size),
                plan.threads_per_row, make_divider(static_cast<uint32>(rows.num_inner))},
      .num_groups = make_divider(static_cast<uint32>(num_groups)),
      .group_size = group_size};
  const int64_t blocks = (all_groups + plan.rows_per_block - 1) / plan.rows_per_block;
  launch(kernels.of(format, wide.dtype, vec_size), device(input.tensor.get_device_index()),
         {.grid_x = static_cast<unsigned>(blocks), .block = plan.block}, &params);
}

const FormatKernels& quantize_kernels() {
  static const FormatKernels kernels(kQuantize);
  return kernels;
}

// max|input| / the largest number of `format`, into scale [1].
void run_tensor_scale(const Arg& input, Dtype format, const Tensor& scale) {
  static const AccessKernels maxima(max_name);
  static const std::array scales = {&kernel(scale_name(kFormats[0])),
                                    &kernel(scale_name(kFormats[1])),
                                    &kernel(scale_name(kFormats[2]))};
  const Rows rows = rows_of(input);
  if (rows.num_rows > kMaxCount || rows.hidden > kMaxCount) {
    fail(input.op, "input", "fewer than 2^31 rows of fewer than 2^31 elements",
         std::to_string(rows.num_rows) + " of " + std::to_string(rows.hidden), "Split the call");
  }
  const int vec_size = access_width({&input}, {rows.hidden});
  const int64_t vecs_per_row = std::max<int64_t>(rows.hidden / vec_size, 1);
  const int64_t num_rows = rows.hidden == 0 ? 0 : rows.num_rows;
  const int64_t wanted = (num_rows * vecs_per_row + kTensorMaxThreads - 1) / kTensorMaxThreads;
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, kMaxPartials);
  const int64_t step = blocks * kTensorMaxThreads;
  const Tensor partials = empty(input.tensor, {blocks}, Dtype::Float);
  const Device& gpu = device(input.tensor.get_device_index());
  const TensorMaxParams params{.input = input.tensor.const_data_ptr(),
                               .partials = static_cast<float*>(partials.mutable_data_ptr()),
                               .input_strides = {rows.outer_stride, rows.inner_stride},
                               .num_rows = static_cast<uint32>(num_rows),
                               .step_rows = static_cast<uint32>(step / vecs_per_row),
                               .step_columns = static_cast<uint32>(step % vecs_per_row),
                               .vecs_per_row = make_divider(static_cast<uint32>(vecs_per_row)),
                               .num_inner = make_divider(static_cast<uint32>(rows.num_inner))};
  launch(maxima.of(input.dtype, vec_size), gpu,
         {.grid_x = static_cast<unsigned>(blocks), .block = kTensorMaxThreads}, &params);
  const TensorScaleParams finish{static_cast<const float*>(partials.const_data_ptr()),
                                 static_cast<float*>(scale.mutable_data_ptr()),
                                 static_cast<uint32>(blocks)};
  const auto at = static_cast<size_t>(std::ranges::find(kFormats, format) - kFormats.begin());
  launch(*scales[at], gpu, {.block = kMaxPartials}, &finish);
}

std::tuple<Tensor, Tensor> quantize(const Tensor& input, Dtype format, int64_t group_size) {
  const Arg arg{"quantize", "input", input};
  check_rows(arg, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_format(arg.op, format);
  const int64_t num_groups = groups_of_row(arg, group_size);
  const Tensor out = empty(input, {arg.sizes.data(), arg.sizes.size()}, format);
  const Arg out_arg{arg.op, "out", out};
  if (group_size == kWholeTensor) {
    const Tensor scale = empty(input, {1}, Dtype::Float);
    run_tensor_scale(arg, format, scale);
    run_groups(quantize_kernels(), format, arg, out_arg, 1,
               {static_cast<const float*>(scale.const_data_ptr()), nullptr, 0, 1.0f});
    return {out, scale};
  }
  std::vector<int64_t> shape(arg.sizes.begin(), arg.sizes.end());
  shape.back() = num_groups;
  const Tensor scale = empty(input, shape, Dtype::Float);
  run_groups(quantize_kernels(), format, arg, out_arg, num_groups,
             {nullptr, static_cast<float*>(scale.mutable_data_ptr()), 0, 1.0f});
  return {out, scale};
}

// Groups of a row by the shape of the scales: one for all, or [..., num_groups].
std::pair<int64_t, QuantScale> scales_of(const Arg& scale, const Arg& input) {
  check_same_device(scale, input);
  check_dtype(scale, {Dtype::Float});
  const QuantScale found{static_cast<const float*>(scale.tensor.const_data_ptr()), nullptr, 0,
                         1.0f};
  if (scale.tensor.numel() == 1) return {1, found};
  std::vector<int64_t> shape(input.sizes.begin(), input.sizes.end());
  shape.back() = scale.rank() == 0 ? 1 : scale.sizes.back();
  check_shape(scale, shape, "[..., num_groups] (or 1 element)");
  if (shape.back() == 0 ? input.sizes.back() != 0 : input.sizes.back() % shape.back() != 0) {
    fail(scale.op, scale.name,
         "a number of groups that divides the last dimension of 'input', " +
             std::to_string(input.sizes.back()),
         std::to_string(shape.back()), "Pass one scale for each group of neighbouring elements");
  }
  if (!scale.tensor.is_contiguous()) {
    fail(scale.op, scale.name, "a contiguous tensor", "strides " + shape_text(scale.strides),
         "Call .contiguous() on it first");
  }
  return {std::max<int64_t>(shape.back(), 1), {found.given, nullptr, 1, 1.0f}};
}

Tensor quantize_with_scale(const Tensor& input, const Tensor& scale, Dtype format) {
  const Arg arg{"quantize", "input", input};
  check_rows(arg, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_format(arg.op, format);
  const auto [num_groups, scales] = scales_of({arg.op, "scale", scale}, arg);
  const Tensor out = empty(input, {arg.sizes.data(), arg.sizes.size()}, format);
  run_groups(quantize_kernels(), format, arg, {arg.op, "out", out}, num_groups, scales);
  return out;
}

Tensor dequantize(const Tensor& input, const Tensor& scale, Dtype dtype) {
  static const FormatKernels kernels(kDequantize);
  const Arg arg{"dequantize", "input", input};
  check_rows(arg, {Dtype::Float8_e4m3fn, Dtype::Float8_e5m2, Dtype::Char});
  if (dtype != Dtype::Half && dtype != Dtype::BFloat16 && dtype != Dtype::Float) {
    fail(arg.op, "dtype", "torch.float16, torch.bfloat16 or torch.float32", dtype_name(dtype),
         "Pass one of these");
  }
  const auto [num_groups, scales] = scales_of({arg.op, "scale", scale}, arg);
  const Tensor out = empty(input, {arg.sizes.data(), arg.sizes.size()}, dtype);
  run_groups(kernels, arg.dtype, arg, {arg.op, "out", out}, num_groups, scales);
  return out;
}

}  // namespace

static void schemas(Library& m) {
  m.def("quantize(Tensor input, ScalarType dtype, SymInt group_size) -> (Tensor, Tensor)");
  m.def("quantize_with_scale(Tensor input, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("dequantize(Tensor input, Tensor scale, ScalarType dtype) -> Tensor");
}

static void kernels(Library& m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_with_scale", TORCH_BOX(&quantize_with_scale));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
