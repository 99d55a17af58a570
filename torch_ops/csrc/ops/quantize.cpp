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
constexpr const char* kTensorMax = "quantization/quantize_tensor.cuh:tensor_max";
constexpr const char* kQuantizeTensor = "quantization/quantize_tensor.cuh:quantize_tensor";
constexpr std::array kFormats = {Dtype::Float8_e4m3fn, Dtype::Float8_e5m2, Dtype::Char};

auto quant_name(const char* entry, Dtype format) {
  return [=](const Access& access) {
    return kernel_name(entry, device_type(access.dtype), device_type(format), access.vec_size);
  };
}

std::string max_name(const Access& access) {
  return kernel_name(kTensorMax, device_type(access.dtype), access.vec_size);
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
    add_access_rows(rows, "quantize", quant_name(kQuantizeTensor, format), kFlatThreads);
    add_access_rows(rows, "dequantize", quant_name(kDequantize, format), kDequantizeFewThreads);
  }
  add_access_rows(rows, "quantize", max_name, kFlatThreads);
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
void launch_groups(Dtype format, const Arg& input, const Rows& rows, const Arg& out,
                   const Rows& out_rows, int64_t num_groups, const QuantScale& scale) {
  static const FormatKernels kernels(kQuantize);
  const int64_t all_groups = rows.num_rows * num_groups;
  if (all_groups == 0 || (rows.hidden == 0 && !scale.computed)) return;
  if (all_groups > kMaxCount) {
    fail(input.op, "input", "fewer than 2^31 groups", std::to_string(all_groups), "Split the call");
  }
  const int64_t group_size = rows.hidden / num_groups;
  const int vec_size = access_width({&input, &out}, {group_size});
  const RowPlan plan = maxima_plan(group_size, vec_size);
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
  launch(kernels.of(format, input.dtype, vec_size), device(input.tensor.get_device_index()),
         {.grid_x = static_cast<unsigned>(blocks), .block = plan.block}, &params);
}

void run_groups(Dtype format, const Arg& input, const Arg& out, int64_t num_groups,
                const QuantScale& scale) {
  const auto [rows, out_rows] = matching_rows(input, out);
  launch_groups(format, input, rows, out, out_rows, num_groups, scale);
}

void check_counts(const Arg& input, const Rows& rows) {
  if (rows.num_rows <= kMaxCount && rows.hidden <= kMaxCount) return;
  fail(input.op, "input", "fewer than 2^31 rows of fewer than 2^31 elements",
       std::to_string(rows.num_rows) + " of " + std::to_string(rows.hidden), "Split the call");
}

// A grid that walks all vectors of a tensor, and what its threads need to know.
struct Flat {
  unsigned blocks;
  FlatRows rows;
};

// At most `most` blocks; at first one vector a thread, so that few of them are spread widely.
Flat flat_of(const Arg& input, const Rows& rows, int vec_size, int64_t most) {
  check_counts(input, rows);
  const int64_t vecs_per_row = std::max<int64_t>(rows.hidden / vec_size, 1);
  const int64_t num_rows = rows.hidden == 0 ? 0 : rows.num_rows;
  const int64_t wanted = (num_rows * vecs_per_row + kFlatThreads - 1) / kFlatThreads;
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, most);
  const int64_t step = blocks * kFlatThreads;
  return {static_cast<unsigned>(blocks),
          {.strides = {rows.outer_stride, rows.inner_stride},
           .num_rows = static_cast<uint32>(num_rows),
           .step_rows = static_cast<uint32>(step / vecs_per_row),
           .step_columns = static_cast<uint32>(step % vecs_per_row),
           .vecs_per_row = make_divider(static_cast<uint32>(vecs_per_row)),
           .num_inner = make_divider(static_cast<uint32>(rows.num_inner))}};
}

// Blocks that fit the GPU at once.
int64_t flat_places(const Device& gpu) {
  constexpr int64_t kBlocksPerSm = 6;
  return gpu.num_sms * kBlocksPerSm;
}

// One scale for everything: max|input| / the largest number of `format`, into scale [1].
void run_tensor(Dtype format, const Arg& input, const Tensor& out, const Tensor& scale) {
  static const AccessKernels maxima(max_name);
  static const FormatKernels kernels(kQuantizeTensor);
  const Rows rows = rows_of(input);
  const int vec_size = access_width({&input}, {rows.hidden});
  const Device& gpu = device(input.tensor.get_device_index());
  const Flat flat =
      flat_of(input, rows, vec_size, std::min<int64_t>(flat_places(gpu), kMaxPartials));
  const Tensor partials = empty(input.tensor, {flat.blocks}, Dtype::Float);
  const TensorMaxParams params{input.tensor.const_data_ptr(),
                               static_cast<float*>(partials.mutable_data_ptr()), flat.rows};
  const Launch how{.grid_x = flat.blocks, .block = kFlatThreads};
  launch(maxima.of(input.dtype, vec_size), gpu, how, &params);
  const QuantizeTensorParams finish{params.input,    out.mutable_data_ptr(),
                                    params.partials, static_cast<float*>(scale.mutable_data_ptr()),
                                    flat.rows,       flat.blocks};
  launch(kernels.of(format, input.dtype, vec_size), gpu,
         {.grid_x = how.grid_x, .block = how.block, .pdl = gpu.sm >= 90}, &finish);
}

// Whether a tensor is one run of few enough elements for the registers of one block.
bool is_short_run(const Arg& input) {
  const int64_t room =
      int64_t{kRowMaxThreads} * kRowSlots * access_width({&input}, {input.numel()});
  return input.numel() <= room && input.tensor.is_contiguous();
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
    if (is_short_run(arg)) {
      const Rows run{1, 1, 0, 0, arg.numel()};
      launch_groups(format, arg, run, out_arg, run, 1,
                    {nullptr, static_cast<float*>(scale.mutable_data_ptr()), 0, 1.0f});
    } else {
      run_tensor(format, arg, out, scale);
    }
    return {out, scale};
  }
  std::vector<int64_t> shape(arg.sizes.begin(), arg.sizes.end());
  shape.back() = num_groups;
  const Tensor scale = empty(input, shape, Dtype::Float);
  run_groups(format, arg, out_arg, num_groups,
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
  run_groups(format, arg, {arg.op, "out", out}, num_groups, scales);
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
  if (arg.numel() == 0) return out;
  const Rows rows = rows_of(arg);
  const Arg out_arg{arg.op, "out", out};
  const int64_t group_size = rows.hidden / num_groups;
  const int vec_size = access_width({&out_arg, &arg}, {group_size});
  check_counts(arg, rows);
  const int64_t vecs_per_row = rows.hidden / vec_size;
  RangePlan plan = range_plan(rows.num_rows, vecs_per_row, kDequantizeFewThreads,
                              rows.have_one_stride() && num_groups == 1);
  const bool is_few = plan.ranges.are_rows && rows.num_rows * vecs_per_row <= kDequantizeFew;
  if (!is_few) {
    plan = range_plan(rows.num_rows, vecs_per_row, kDequantizeThreads * dequantize_slots(vec_size),
                      false);
  }
  const DequantizeParams params{
      .input = input.const_data_ptr(),
      .output = out.mutable_data_ptr(),
      .scales = scales.given,
      .stride = rows.inner_stride,
      .scale_stride = static_cast<uint32>(scales.stride),
      .ranges = plan.ranges,
      .num_inner = make_divider(static_cast<uint32>(rows.num_inner)),
      .outer_stride = rows.outer_stride,
      .num_groups = static_cast<uint32>(num_groups),
      .vecs_per_group = make_divider(static_cast<uint32>(group_size / vec_size))};
  launch(kernels.of(arg.dtype, dtype, vec_size), device(input.get_device_index()),
         {.grid_x = plan.grid_x,
          .grid_y = plan.grid_y,
          .block = is_few ? kDequantizeFewThreads : kDequantizeThreads},
         &params);
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
