// silu_and_mul, gelu_and_mul, gelu_tanh_and_mul, with outputs of the input's type or of fp8:
// schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "activation/params.h"
#include "runtime/access.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"
#include "runtime/pdl.h"
#include "runtime/quant.h"
#include "runtime/rows.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;  // rows, and elements of one row
constexpr int64_t kThreadsOfLargeSm = 2048;
constexpr const char* kGated = "activation/gated.cuh:gated";

constexpr Dtype kFp8 = Dtype::Float8_e4m3fn;

// An op is an activation type of kernels/activation/functions.cuh; its fp8 output is an op too.
struct GatedOp {
  const char* op;
  const char* quant_op;
  const char* activation;
};
constexpr GatedOp kSilu{"silu_and_mul", "silu_and_mul_quant", "Silu"};
constexpr GatedOp kGelu{"gelu_and_mul", "gelu_and_mul_quant", "Gelu"};
constexpr GatedOp kGeluTanh{"gelu_tanh_and_mul", "gelu_tanh_and_mul_quant", "GeluTanh"};
constexpr std::array kGatedOps = {kSilu, kGelu, kGeluTanh};

auto gated_name(const GatedOp& op, bool quantizes) {
  return [activation = op.activation, quantizes](const Access& access) {
    const char* type = device_type(access.dtype);
    return quantizes ? kernel_name(kGated, type, access.vec_size, activation, device_type(kFp8))
                     : kernel_name(kGated, type, access.vec_size, activation);
  };
}

std::vector<Row> gated_rows() {
  std::vector<Row> rows;
  for (const GatedOp& op : kGatedOps) {
    add_access_rows(rows, op.op, gated_name(op, false), kGatedThreads);
    add_access_rows(rows, op.quant_op, gated_name(op, true), kGatedThreads);
  }
  return rows;
}

Choice gated_choose(const std::string& op, const Config& config, int) {
  for (const GatedOp& gated : kGatedOps) {
    if (op == gated.op || op == gated.quant_op) {
      return choose_access(config, gated_name(gated, op == gated.quant_op));
    }
  }
  return {};
}

const RegisterFamily family({[] {
                               std::vector<std::string> names;
                               for (const GatedOp& op : kGatedOps) {
                                 names.insert(names.end(), {op.op, op.quant_op});
                               }
                               return names;
                             }(),
                             gated_rows, gated_choose});

int64_t row_length(const Tensor& tensor) {
  return tensor.size(tensor.dim() - 1);
}

void check_input(const Arg& input) {
  check_cuda(input);
  check_dtype(input, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  if (input.tensor.dim() == 0 || row_length(input.tensor) % 2 != 0) {
    fail(input.op, input.name, "an even last dimension (gate and value side by side)",
         "shape " + shape_text(input.tensor),
         "Concatenate the two projections along the last dimension");
  }
  check_last_stride(input);
}

std::vector<int64_t> output_shape(const Tensor& input) {
  const auto sizes = input.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() /= 2;
  return shape;
}

void check_counts(const char* op, const Rows& rows) {
  if (rows.num_rows > kMaxCount || rows.hidden > kMaxCount) {
    fail(op, "input", "fewer than 2^31 rows of fewer than 2^31 elements",
         std::to_string(rows.num_rows) + " of " + std::to_string(rows.hidden), "Split the call");
  }
}

void run_gated(const AccessKernels& kernels, const Arg& input, const Arg& out,
               const QuantScale& scale, bool enable_pdl) {
  const Device& gpu = device(input.tensor.get_device_index());
  const bool pdl = checked_pdl(input.op, gpu, enable_pdl);
  const auto [rows, out_rows] = matching_rows(input, out);
  const int64_t hidden = out_rows.hidden;
  if (rows.num_rows == 0 || hidden == 0) return;
  check_counts(input.op, rows);

  const int vec_size = access_width({&input, &out}, {hidden});
  const bool is_plain = rows.have_one_stride() && out_rows.are_one_run();
  const int64_t num_vecs = rows.num_rows * hidden / vec_size;
  const auto plan_of = [&](int64_t size) {
    return range_plan(rows.num_rows, hidden / size, kGatedThreads, is_plain);
  };
  RangePlan plan = plan_of(vec_size);
  // Smaller loads, more of them at once.
  const bool halves = vec_size > 1 && plan.ranges.are_rows &&
                      2 * num_vecs <= int64_t{gpu.num_sms} * kThreadsOfLargeSm;
  if (halves) plan = plan_of(vec_size / 2);
  const GatedParams params{.input = input.tensor.const_data_ptr(),
                           .output = out.tensor.mutable_data_ptr(),
                           .scale = scale.given,
                           .input_stride = rows.inner_stride,
                           .hidden = static_cast<uint32>(hidden),
                           .halves = halves,
                           .ranges = plan.ranges,
                           .scale_value = scale.value,
                           .num_inner = make_divider(static_cast<uint32>(rows.num_inner)),
                           .input_outer_stride = rows.outer_stride,
                           .output_strides = {out_rows.outer_stride, out_rows.inner_stride}};
  launch(kernels.of(input.tensor.scalar_type(), vec_size), gpu,
         {.grid_x = plan.grid_x, .grid_y = plan.grid_y, .block = kGatedThreads, .pdl = pdl},
         &params);
}

// The kernels of an op, made at its first call.
template <const GatedOp& op, bool kQuantizes>
const AccessKernels& gated_kernels() {
  static const AccessKernels kernels(gated_name(op, kQuantizes));
  return kernels;
}

template <const GatedOp& op>
Tensor act_and_mul(const Tensor& input, bool enable_pdl) {
  const Arg input_arg{op.op, "input", input};
  check_input(input_arg);
  const Tensor out = empty(input, output_shape(input), input.scalar_type());
  run_gated(gated_kernels<op, false>(), input_arg, {op.op, "out", out}, {}, enable_pdl);
  return out;
}

void check_gated_out(const Arg& out, const Arg& input) {
  check_shape(out, output_shape(input.tensor), "[..., hidden]");
  check_last_stride(out);
  check_writable(out);
  check_distinct(out, input);
}

template <const GatedOp& op>
void act_and_mul_out(const Tensor& out, const Tensor& input, bool enable_pdl) {
  const Arg input_arg{op.op, "input", input}, out_arg{op.op, "out", out};
  check_input(input_arg);
  check_same_device(out_arg, input_arg);
  check_same_dtype(out_arg, input_arg);
  check_gated_out(out_arg, input_arg);
  run_gated(gated_kernels<op, false>(), input_arg, out_arg, {}, enable_pdl);
}

template <const GatedOp& op>
void act_and_mul_quant(const Tensor& out, const Tensor& input, const std::optional<Tensor>& scale,
                       double scale_value, bool enable_pdl) {
  const Arg input_arg{op.op, "input", input}, out_arg{op.op, "out", out};
  check_input(input_arg);
  check_same_device(out_arg, input_arg);
  check_dtype(out_arg, {kFp8});
  check_gated_out(out_arg, input_arg);
  run_gated(gated_kernels<op, true>(), input_arg, out_arg,
            given_scale(input_arg, scale, scale_value), enable_pdl);
}

}  // namespace

static void schemas(Library& m) {
  for (const GatedOp& op : kGatedOps) {
    const std::string name = op.op;
    m.def((name + "(Tensor input, bool enable_pdl=False) -> Tensor").c_str());
    m.def((name + "_out(Tensor(a!) out, Tensor input, bool enable_pdl=False) -> ()").c_str());
    m.def((name + "_quant(Tensor(a!) out, Tensor input, Tensor? scale, float scale_value, "
                  "bool enable_pdl=False) -> ()")
              .c_str());
  }
}

static void kernels(Library& m) {
  m.impl("silu_and_mul", TORCH_BOX(&act_and_mul<kSilu>));
  m.impl("silu_and_mul_out", TORCH_BOX(&act_and_mul_out<kSilu>));
  m.impl("silu_and_mul_quant", TORCH_BOX(&act_and_mul_quant<kSilu>));
  m.impl("gelu_and_mul", TORCH_BOX(&act_and_mul<kGelu>));
  m.impl("gelu_and_mul_out", TORCH_BOX(&act_and_mul_out<kGelu>));
  m.impl("gelu_and_mul_quant", TORCH_BOX(&act_and_mul_quant<kGelu>));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&act_and_mul<kGeluTanh>));
  m.impl("gelu_tanh_and_mul_out", TORCH_BOX(&act_and_mul_out<kGeluTanh>));
  m.impl("gelu_tanh_and_mul_quant", TORCH_BOX(&act_and_mul_quant<kGeluTanh>));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
