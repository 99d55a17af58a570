// silu_and_mul: schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>
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
#include "runtime/rows.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;  // rows, and elements of one row
constexpr const char* kGated = "activation/gated.cuh:gated";

// An op is an activation type of kernels/activation/functions.cuh.
struct GatedOp {
  const char* op;
  const char* activation;
};
constexpr std::array kGatedOps = {GatedOp{"silu_and_mul", "Silu"}};

auto gated_name(const GatedOp& op) {
  return [activation = op.activation](const Access& access) {
    return kernel_name(kGated, device_type(access.dtype), access.vec_size, activation);
  };
}

std::vector<Row> gated_rows() {
  std::vector<Row> rows;
  for (const GatedOp& op : kGatedOps) add_access_rows(rows, op.op, gated_name(op), kGatedThreads);
  return rows;
}

Choice gated_choose(const std::string& op, const Config& config, int) {
  const auto gated = std::ranges::find(kGatedOps, op, &GatedOp::op);
  return choose_access(config, gated_name(*gated));
}

const RegisterFamily family({{"silu_and_mul"}, gated_rows, gated_choose});

void check_input(const Arg& input) {
  check_cuda(input);
  check_dtype(input, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  if (input.rank() == 0 || input.sizes.back() % 2 != 0) {
    fail(input.op, input.name, "an even last dimension (gate and value side by side)",
         "shape " + shape_text(input.tensor),
         "Concatenate the two projections along the last dimension");
  }
  check_last_stride(input);
}

std::vector<int64_t> output_shape(const Arg& input) {
  std::vector<int64_t> shape(input.sizes.begin(), input.sizes.end());
  shape.back() /= 2;
  return shape;
}

void check_counts(const char* op, const Rows& rows) {
  if (rows.num_rows > kMaxCount || rows.hidden > kMaxCount) {
    fail(op, "input", "fewer than 2^31 rows of fewer than 2^31 elements",
         std::to_string(rows.num_rows) + " of " + std::to_string(rows.hidden), "Split the call");
  }
}

void run_gated(const AccessKernels& kernels, const Arg& input, const Arg& out, bool enable_pdl) {
  const Device& gpu = device(input.gpu);
  const bool pdl = checked_pdl(input.op, gpu, enable_pdl);
  const auto [rows, out_rows] = matching_rows(input, out);
  const int64_t hidden = out_rows.hidden;
  if (rows.num_rows == 0 || hidden == 0) return;
  check_counts(input.op, rows);

  const int vec_size = access_width({&input, &out}, {hidden});
  const GatedPlan plan = gated_plan(rows.num_rows, hidden, vec_size);
  const GatedParams params{.input = input.data,
                           .output = out.tensor.mutable_data_ptr(),
                           .input_strides = {rows.outer_stride, rows.inner_stride},
                           .output_strides = {out_rows.outer_stride, out_rows.inner_stride},
                           .hidden = hidden,
                           .packed = is_packed(rows) && is_packed(out_rows),
                           .num_rows = static_cast<uint32>(rows.num_rows),
                           .rows_per_range = plan.rows_per_range,
                           .vecs_per_range = plan.vecs_per_range,
                           .vecs_per_row = make_divider(static_cast<uint32>(hidden / vec_size)),
                           .num_inner = make_divider(static_cast<uint32>(rows.num_inner))};
  launch(kernels.of(input.dtype, vec_size), gpu,
         {.grid_x = plan.grid_x, .grid_y = plan.grid_y, .block = kGatedThreads, .pdl = pdl},
         &params);
}

const AccessKernels& silu_kernels() {
  static const AccessKernels kernels(gated_name(kGatedOps[0]));
  return kernels;
}

Tensor silu_and_mul(const Tensor& input, bool enable_pdl) {
  const Arg input_arg{"silu_and_mul", "input", input};
  check_input(input_arg);
  const Tensor out = empty(input_arg.gpu, output_shape(input_arg), input_arg.dtype);
  run_gated(silu_kernels(), input_arg, {"silu_and_mul", "out", out}, enable_pdl);
  return out;
}

void silu_and_mul_out(const Tensor& out, const Tensor& input, bool enable_pdl) {
  const Arg input_arg{"silu_and_mul", "input", input}, out_arg{"silu_and_mul", "out", out};
  check_input(input_arg);
  check_same_device(out_arg, input_arg);
  check_same_dtype(out_arg, input_arg);
  check_shape(out_arg, output_shape(input_arg), "[..., hidden]");
  check_last_stride(out_arg);
  check_writable(out_arg);
  check_distinct(out_arg, input_arg);
  run_gated(silu_kernels(), input_arg, out_arg, enable_pdl);
}

}  // namespace

static void schemas(Library& m) {
  m.def("silu_and_mul(Tensor input, bool enable_pdl=False) -> Tensor");
  m.def("silu_and_mul_out(Tensor(a!) out, Tensor input, bool enable_pdl=False) -> ()");
}

static void kernels(Library& m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("silu_and_mul_out", TORCH_BOX(&silu_and_mul_out));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
