// rmsnorm, fused_add_rmsnorm: schemas, checks, choice of kernel, launch.

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "norm/params.h"
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

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

constexpr const char* kRmsnorm = "norm/rmsnorm.cuh:rmsnorm";
constexpr const char* kFusedAdd = "norm/fused_add_rmsnorm.cuh:fused_add_rmsnorm";

// The weight is of the input's dtype or float32.
auto norm_name(const char* entry, bool float_weight) {
  return [=](const Access& access) {
    const char* type = device_type(access.dtype);
    return kernel_name(entry, type, float_weight ? "float" : type, access.vec_size);
  };
}

class NormKernels {
 public:
  explicit NormKernels(const char* entry)
      : same_weight_(norm_name(entry, false)), float_weight_(norm_name(entry, true)) {}
  Kernel& of(Dtype dtype, Dtype weight, int vec_size) const {
    return (weight == dtype ? same_weight_ : float_weight_).of(dtype, vec_size);
  }

 private:
  AccessKernels same_weight_, float_weight_;
};

std::vector<Row> norm_rows() {
  std::vector<Row> rows;
  for (const auto& [op, entry] :
       {std::pair{"rmsnorm", kRmsnorm}, {"fused_add_rmsnorm", kFusedAdd}}) {
    add_access_rows(rows, op, norm_name(entry, false), kNormMaxThreads);
    add_access_rows(rows, op, norm_name(entry, true), kNormMaxThreads);
  }
  return rows;
}

Choice norm_choose(const std::string& op, const Config& config, int) {
  const std::string dtype = config.get("dtype", "float16");
  const std::string weight = config.get("weight_dtype", dtype);
  if (weight != dtype && weight != "float32") {
    return {{}, {"weight_dtype " + weight + ": expected " + dtype + " or float32"}};
  }
  return choose_access(config, norm_name(op == "rmsnorm" ? kRmsnorm : kFusedAdd, weight != dtype));
}

const RegisterFamily family({{"rmsnorm", "fused_add_rmsnorm"}, norm_rows, norm_choose});

void check_input(const Arg& input) {
  check_cuda(input);
  check_dtype(input, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  if (input.rank() == 0) {
    fail(input.op, input.name, "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]");
  }
  check_last_stride(input);
}

void check_weight(const Arg& weight, const Arg& input) {
  check_same_device(weight, input);
  check_rank(weight, {1});
  check_shape(weight, input.sizes.last(1), "[hidden]");
  if (weight.dtype != Dtype::Float) check_same_dtype(weight, input);
  check_last_stride(weight);
}

void check_like_input(const Arg& arg, const Arg& input) {
  check_same_device(arg, input);
  check_same_dtype(arg, input);
  check_shape(arg, input.sizes, "that of 'input'");
  check_last_stride(arg);
}

void check_eps(const char* op, double eps) {
  if (std::isfinite(eps) && eps >= 0) return;
  fail(op, "eps", "a finite number >= 0", std::to_string(eps), "1e-6 is the default");
}

NormShape norm_shape(const char* op, const Rows& rows, int vec_size, double eps) {
  if (rows.num_rows > kMaxRows) {
    fail(op, "input", "fewer than 2^31 rows", std::to_string(rows.num_rows), "Split the call");
  }
  return {static_cast<uint32>(rows.num_rows),
          static_cast<uint32>(rows.hidden / vec_size),
          norm_plan(rows.hidden, vec_size).threads_per_row,
          make_divider(static_cast<uint32>(rows.num_inner)),
          static_cast<float>(rows.hidden),
          static_cast<float>(eps)};
}

template <class Params>
void launch_norm(const NormKernels& kernels, const Arg& input, const Arg& weight,
                 const Params& params, int vec_size, int64_t hidden, bool pdl) {
  const NormPlan plan = norm_plan(hidden, vec_size);
  const unsigned blocks = (params.shape.num_rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const Device& gpu = device(input.gpu);
  launch(kernels.of(input.dtype, weight.dtype, vec_size), gpu,
         {.grid_x = blocks, .block = plan.block, .pdl = checked_pdl(input.op, gpu, pdl)}, &params);
}

RowStrides strides_of(const Rows& rows) {
  return {rows.outer_stride, rows.inner_stride};
}

int norm_width(const Arg& input, const Arg& other, const Arg& weight) {
  return access_width({&input, &other, &weight}, {input.sizes.back()});
}

void run_rmsnorm(const Arg& out, const Arg& input, const Arg& weight, double eps, bool enable_pdl) {
  static const NormKernels kernels(kRmsnorm);
  const auto [rows, out_rows] = matching_rows(input, out);
  if (rows.num_rows == 0 || rows.hidden == 0) return;
  const int vec_size = norm_width(input, out, weight);
  const RmsnormParams params{
      input.data,       weight.data,          out.tensor.mutable_data_ptr(),
      strides_of(rows), strides_of(out_rows), norm_shape(input.op, rows, vec_size, eps)};
  launch_norm(kernels, input, weight, params, vec_size, rows.hidden, enable_pdl);
}

Tensor rmsnorm(const Tensor& input, const Tensor& weight, double eps, bool enable_pdl) {
  const Arg input_arg{"rmsnorm", "input", input}, weight_arg{"rmsnorm", "weight", weight};
  check_input(input_arg);
  check_weight(weight_arg, input_arg);
  check_eps("rmsnorm", eps);
  const Tensor out = empty_like(input_arg);
  run_rmsnorm({"rmsnorm", "out", out}, input_arg, weight_arg, eps, enable_pdl);
  return out;
}

void rmsnorm_out(const Tensor& out, const Tensor& input, const Tensor& weight, double eps,
                 bool enable_pdl) {
  const Arg input_arg{"rmsnorm", "input", input}, weight_arg{"rmsnorm", "weight", weight};
  const Arg out_arg{"rmsnorm", "out", out};
  check_input(input_arg);
  check_weight(weight_arg, input_arg);
  check_like_input(out_arg, input_arg);
  check_writable(out_arg);
  check_out(out_arg, input_arg);
  check_distinct(out_arg, weight_arg);
  check_eps("rmsnorm", eps);
  run_rmsnorm(out_arg, input_arg, weight_arg, eps, enable_pdl);
}

void fused_add_rmsnorm(const Tensor& input, const Tensor& residual, const Tensor& weight,
                       double eps, bool enable_pdl) {
  constexpr const char* kOp = "fused_add_rmsnorm";
  static const NormKernels kernels(kFusedAdd);
  const Arg input_arg{kOp, "input", input}, residual_arg{kOp, "residual", residual};
  check_input(input_arg);
  check_like_input(residual_arg, input_arg);
  const Arg weight_arg{kOp, "weight", weight};
  check_weight(weight_arg, input_arg);
  check_writable(input_arg);
  check_writable(residual_arg);
  check_distinct(residual_arg, input_arg);
  check_distinct(input_arg, weight_arg);
  check_distinct(residual_arg, weight_arg);
  check_eps(kOp, eps);
  const auto [rows, residual_rows] = matching_rows(input_arg, residual_arg);
  if (rows.num_rows == 0 || rows.hidden == 0) return;
  const int vec_size = norm_width(input_arg, residual_arg, weight_arg);
  const FusedAddRmsnormParams params{
      input.mutable_data_ptr(), residual.mutable_data_ptr(), weight_arg.data,
      strides_of(rows),         strides_of(residual_rows),   norm_shape(kOp, rows, vec_size, eps)};
  launch_norm(kernels, input_arg, weight_arg, params, vec_size, rows.hidden, enable_pdl);
}

}  // namespace

static void schemas(Library& m) {
  m.def("rmsnorm(Tensor input, Tensor weight, float eps=1e-6, bool enable_pdl=False) -> Tensor");
  m.def(
      "rmsnorm_out(Tensor(a!) out, Tensor input, Tensor weight, float eps=1e-6, bool "
      "enable_pdl=False) "
      "-> ()");
  m.def(
      "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps=1e-6, "
      "bool enable_pdl=False) -> ()");
}

static void kernels(Library& m) {
  m.impl("rmsnorm", TORCH_BOX(&rmsnorm));
  m.impl("rmsnorm_out", TORCH_BOX(&rmsnorm_out));
  m.impl("fused_add_rmsnorm", TORCH_BOX(&fused_add_rmsnorm));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
