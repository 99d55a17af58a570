// The norms, with outputs of the input's type or of 8 bits: schemas, checks, choice of kernel,
// launch.

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
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
#include "runtime/quant.h"
#include "runtime/rows.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

// An op is an entry of kernels/norm, for outputs of the input's type or of 8 bits.
struct NormOp {
  const char* op;
  const char* entry;
  bool quantizes;
};
constexpr const char* kRmsnorm = "norm/rmsnorm.cuh:rmsnorm";
constexpr const char* kFusedAdd = "norm/fused_add_rmsnorm.cuh:fused_add_rmsnorm";
constexpr const char* kLayernorm = "norm/layernorm.cuh:layernorm";
constexpr const char* kLongLayernorm = "norm/layernorm.cuh:layernorm_long";
constexpr std::array kNormOps = {
    NormOp{"rmsnorm", kRmsnorm, false},
    NormOp{"gemma_rmsnorm", kRmsnorm, false},
    NormOp{"fused_add_rmsnorm", kFusedAdd, false},
    NormOp{"gemma_fused_add_rmsnorm", kFusedAdd, false},
    NormOp{"layernorm", kLayernorm, false},
    NormOp{"rmsnorm_quant", kRmsnorm, true},
    NormOp{"fused_add_rmsnorm_quant", kFusedAdd, true},
    NormOp{"layernorm_quant", kLayernorm, true},
};

// The weight is of the input's dtype or float32; `quant` is an 8-bit type, or null for the input's.
auto norm_name(const char* entry, bool float_weight, const char* quant) {
  return [=](const Access& access) {
    const char* type = device_type(access.dtype);
    const char* weight = float_weight ? "float" : type;
    return quant ? kernel_name(entry, type, weight, access.vec_size, quant)
                 : kernel_name(entry, type, weight, access.vec_size);
  };
}

class NormKernels {
 public:
  NormKernels(const char* entry, const char* quant)
      : same_weight_(norm_name(entry, false, quant)),
        float_weight_(norm_name(entry, true, quant)) {}
  Kernel& of(Dtype dtype, Dtype weight, int vec_size) const {
    return (weight == dtype ? same_weight_ : float_weight_).of(dtype, vec_size);
  }

 private:
  AccessKernels same_weight_, float_weight_;
};

// All kernels of an entry.
struct NormEntry {
  NormKernels plain, e4m3, int8;

  explicit NormEntry(const char* entry)
      : plain(entry, nullptr),
        e4m3(entry, device_type(Dtype::Float8_e4m3fn)),
        int8(entry, device_type(Dtype::Char)) {}
  const NormKernels& of(Dtype out) const {
    return out == Dtype::Float8_e4m3fn ? e4m3 : out == Dtype::Char ? int8 : plain;
  }
};
const NormEntry& rmsnorm_entry() {
  static const NormEntry entry(kRmsnorm);
  return entry;
}
const NormEntry& fused_add_entry() {
  static const NormEntry entry(kFusedAdd);
  return entry;
}
const NormEntry& layernorm_entry() {
  static const NormEntry entry(kLayernorm);
  return entry;
}

// Of long rows, for outputs of the input's type.
const NormKernels& long_layernorm_kernels() {
  static const NormKernels kernels(kLongLayernorm, nullptr);
  return kernels;
}

std::vector<Row> norm_rows() {
  std::vector<Row> rows;
  const auto add = [&](const NormOp& op, const char* quant) {
    for (const bool float_weight : {false, true}) {
      add_access_rows(rows, op.op, norm_name(op.entry, float_weight, quant), kRowMaxThreads);
    }
  };
  for (const NormOp& op : kNormOps) {
    if (!op.quantizes) {
      add(op, nullptr);
      if (op.entry == kLayernorm) add({op.op, kLongLayernorm, false}, nullptr);
    } else {
      for (const Dtype dtype : kQuantDtypes) add(op, device_type(dtype));
    }
  }
  return rows;
}

Choice norm_choose(const std::string& op, const Config& config, int) {
  const std::string dtype = config.get("dtype", "float16");
  const std::string weight = config.get("weight_dtype", dtype);
  if (weight != dtype && weight != "float32") {
    return {{}, {"weight_dtype " + weight + ": expected " + dtype + " or float32"}};
  }
  const NormOp& found = *std::ranges::find(kNormOps, op, &NormOp::op);
  const char* quant = nullptr;
  if (found.quantizes) {
    const std::string out = config.get("out_dtype", "float8_e4m3fn");
    for (const Dtype allowed : kQuantDtypes) {
      if (dtype_name(allowed) == "torch." + out) quant = device_type(allowed);
    }
    if (!quant) return {{}, {"out_dtype " + out + ": expected float8_e4m3fn or int8"}};
  }
  return choose_access(config, norm_name(found.entry, weight != dtype, quant));
}

const RegisterFamily family({[] {
                               std::vector<std::string> names;
                               for (const NormOp& op : kNormOps) names.push_back(op.op);
                               return names;
                             }(),
                             norm_rows, norm_choose});

void check_input(const Arg& input) {
  check_cuda(input);
  check_dtype(input, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  if (input.tensor.dim() == 0) {
    fail(input.op, input.name, "at least 1 dimension", "a scalar", "Give it a shape [..., hidden]");
  }
  check_last_stride(input);
}

void check_weight(const Arg& weight, const Arg& input) {
  check_same_device(weight, input);
  check_rank(weight, {1});
  const int64_t hidden = input.tensor.size(input.tensor.dim() - 1);
  check_shape(weight, std::array{hidden}, "[hidden]");
  if (weight.dtype != Dtype::Float) check_same_dtype(weight, input);
  check_last_stride(weight);
}

void check_like_input(const Arg& arg, const Arg& input) {
  check_same_device(arg, input);
  check_same_dtype(arg, input);
  const auto sizes = input.tensor.sizes();
  check_shape(arg, {sizes.data(), sizes.size()}, "that of 'input'");
  check_last_stride(arg);
}

void check_eps(const char* op, double eps) {
  if (std::isfinite(eps) && eps >= 0) return;
  fail(op, "eps", "a finite number >= 0", std::to_string(eps), "1e-6 is the default");
}

// The tensors of a call, for all ops; what an op has not is absent.
struct Norm {
  const Arg& out;
  const Arg& input;
  const Arg* residual;
  const Arg& weight;
  const Arg* bias;
  QuantScale scale;
  double eps;
  float weight_offset;
  bool enable_pdl;
};

// Adding this changes no weight, not even -0.
constexpr float kNoOffset = -0.0f;
constexpr float kGemmaOffset = 1.0f;

RowStrides strides_of(const Rows& rows) {
  return {rows.outer_stride, rows.inner_stride};
}

void run(const NormEntry& entry, const Norm& norm) {
  std::array<Rows, 3> rows{};  // input, output, residual
  if (!norm.residual) {
    std::tie(rows[0], rows[1]) = matching_rows(norm.input, norm.out);
  } else if (&norm.out == &norm.input) {
    std::tie(rows[0], rows[2]) = matching_rows(norm.input, *norm.residual);
    rows[1] = rows[0];
  } else {
    rows = matching_rows(norm.input, norm.out, *norm.residual);
  }
  const auto [num_rows, num_inner, outer_stride, inner_stride, hidden] = rows[0];
  const char* op = norm.input.op;
  if (num_rows == 0 || (hidden == 0 && !norm.scale.computed)) return;
  if (num_rows > kMaxRows) {
    fail(op, "input", "fewer than 2^31 rows", std::to_string(num_rows), "Split the call");
  }
  const Tensor& input = norm.input.tensor;
  const int vec_size =
      access_width({&norm.input, &norm.out, &norm.weight, norm.residual, norm.bias}, {hidden});
  const bool quantizes = norm.out.dtype != norm.input.dtype, has_mean = norm.bias != nullptr;
  const bool is_long = has_mean && !quantizes && hidden / vec_size > kLongRowVecs;
  const bool is_rmsnorm = !has_mean && norm.residual == nullptr;
  const int slots = is_long      ? kLongRowSlots
                    : is_rmsnorm ? rmsnorm_slots(quantizes, norm.weight.dtype != norm.input.dtype)
                                 : kRowSlots;
  const RowPlan plan = row_plan(hidden, vec_size, slots);
  const NormParams params{
      .shape = {static_cast<uint32>(num_rows), static_cast<uint32>(hidden / vec_size),
                plan.threads_per_row, make_divider(static_cast<uint32>(num_inner))},
      .input = input.const_data_ptr(),
      .input_strides = strides_of(rows[0]),
      .weight = norm.weight.tensor.const_data_ptr(),
      .residual = norm.residual ? norm.residual->tensor.mutable_data_ptr() : nullptr,
      .residual_strides = strides_of(rows[2]),
      .bias = norm.bias ? norm.bias->tensor.const_data_ptr() : nullptr,
      .output = norm.out.tensor.mutable_data_ptr(),
      .output_strides = strides_of(rows[1]),
      .scale = norm.scale,
      .length = static_cast<float>(hidden),
      .eps = static_cast<float>(norm.eps),
      .weight_offset = norm.weight_offset};
  const unsigned blocks =
      static_cast<unsigned>((num_rows + plan.rows_per_block - 1) / plan.rows_per_block);
  const Device& gpu = device(input.get_device_index());
  const NormKernels& kernels = is_long ? long_layernorm_kernels() : entry.of(norm.out.dtype);
  launch(kernels.of(norm.input.dtype, norm.weight.dtype, vec_size), gpu,
         {.grid_x = blocks, .block = plan.block, .pdl = checked_pdl(op, gpu, norm.enable_pdl)},
         &params);
}

void check_out_of(const Arg& out, const Arg& input, const Arg& weight) {
  check_like_input(out, input);
  check_writable(out);
  check_out(out, input);
  check_distinct(out, weight);
}

Tensor rmsnorm_of(const char* op, const Tensor& input, const Tensor& weight, double eps,
                  float offset, bool enable_pdl) {
  const Arg input_arg{op, "input", input}, weight_arg{op, "weight", weight};
  check_input(input_arg);
  check_weight(weight_arg, input_arg);
  check_eps(op, eps);
  const Tensor out = empty_like(input);
  const Arg out_arg{op, "out", out};
  run(rmsnorm_entry(),
      {out_arg, input_arg, nullptr, weight_arg, nullptr, {}, eps, offset, enable_pdl});
  return out;
}

void rmsnorm_out_of(const char* op, const Tensor& out, const Tensor& input, const Tensor& weight,
                    double eps, float offset, bool enable_pdl) {
  const Arg out_arg{op, "out", out}, input_arg{op, "input", input},
      weight_arg{op, "weight", weight};
  check_input(input_arg);
  check_weight(weight_arg, input_arg);
  check_out_of(out_arg, input_arg, weight_arg);
  check_eps(op, eps);
  run(rmsnorm_entry(),
      {out_arg, input_arg, nullptr, weight_arg, nullptr, {}, eps, offset, enable_pdl});
}

void check_fused_add(const Arg& input, const Arg& residual, const Arg& weight) {
  check_input(input);
  check_like_input(residual, input);
  check_weight(weight, input);
  check_writable(residual);
  check_distinct(residual, input);
  check_distinct(residual, weight);
}

void fused_add_of(const char* op, const Tensor& input, const Tensor& residual, const Tensor& weight,
                  double eps, float offset, bool enable_pdl) {
  const Arg input_arg{op, "input", input}, residual_arg{op, "residual", residual};
  const Arg weight_arg{op, "weight", weight};
  check_fused_add(input_arg, residual_arg, weight_arg);
  check_writable(input_arg);
  check_distinct(input_arg, weight_arg);
  check_eps(op, eps);
  run(fused_add_entry(),
      {input_arg, input_arg, &residual_arg, weight_arg, nullptr, {}, eps, offset, enable_pdl});
}

Tensor rmsnorm(const Tensor& input, const Tensor& weight, double eps, bool enable_pdl) {
  return rmsnorm_of("rmsnorm", input, weight, eps, kNoOffset, enable_pdl);
}

Tensor gemma_rmsnorm(const Tensor& input, const Tensor& weight, double eps, bool enable_pdl) {
  return rmsnorm_of("gemma_rmsnorm", input, weight, eps, kGemmaOffset, enable_pdl);
}

void rmsnorm_out(const Tensor& out, const Tensor& input, const Tensor& weight, double eps,
                 bool enable_pdl) {
  rmsnorm_out_of("rmsnorm", out, input, weight, eps, kNoOffset, enable_pdl);
}

void gemma_rmsnorm_out(const Tensor& out, const Tensor& input, const Tensor& weight, double eps,
                       bool enable_pdl) {
  rmsnorm_out_of("gemma_rmsnorm", out, input, weight, eps, kGemmaOffset, enable_pdl);
}

void fused_add_rmsnorm(const Tensor& input, const Tensor& residual, const Tensor& weight,
                       double eps, bool enable_pdl) {
  fused_add_of("fused_add_rmsnorm", input, residual, weight, eps, kNoOffset, enable_pdl);
}

void gemma_fused_add_rmsnorm(const Tensor& input, const Tensor& residual, const Tensor& weight,
                             double eps, bool enable_pdl) {
  fused_add_of("gemma_fused_add_rmsnorm", input, residual, weight, eps, kGemmaOffset, enable_pdl);
}

Tensor layernorm(const Tensor& input, const Tensor& gamma, const Tensor& beta, double eps) {
  constexpr const char* kOp = "layernorm";
  const Arg input_arg{kOp, "input", input}, gamma_arg{kOp, "gamma", gamma};
  const Arg beta_arg{kOp, "beta", beta};
  check_input(input_arg);
  check_weight(gamma_arg, input_arg);
  check_weight(beta_arg, input_arg);
  check_same_dtype(beta_arg, gamma_arg);
  check_eps(kOp, eps);
  const Tensor out = empty_like(input);
  const Arg out_arg{kOp, "out", out};
  run(layernorm_entry(),
      {out_arg, input_arg, nullptr, gamma_arg, &beta_arg, {}, eps, kNoOffset, false});
  return out;
}

// The 8-bit output of an op beside its other tensors.
void check_quant_out(const Arg& out, const Arg& input, std::initializer_list<const Arg*> others) {
  check_same_device(out, input);
  check_dtype(out, {Dtype::Float8_e4m3fn, Dtype::Char});
  check_shape(out, input.sizes, "that of 'input'");
  check_last_stride(out);
  check_writable(out);
  check_distinct(out, input);
  for (const Arg* other : others) check_distinct(out, *other);
}

void rmsnorm_quant(const Tensor& out, const Tensor& input, const Tensor& weight,
                   const std::optional<Tensor>& token_scale, const std::optional<Tensor>& scale,
                   double scale_value, double eps, bool enable_pdl) {
  constexpr const char* kOp = "rmsnorm_quant";
  const Arg out_arg{kOp, "out", out}, input_arg{kOp, "input", input};
  const Arg weight_arg{kOp, "weight", weight};
  check_input(input_arg);
  check_weight(weight_arg, input_arg);
  check_quant_out(out_arg, input_arg, {&weight_arg});
  check_eps(kOp, eps);
  run(rmsnorm_entry(),
      {out_arg, input_arg, nullptr, weight_arg, nullptr,
       row_scale(out_arg, scale, scale_value, token_scale), eps, kNoOffset, enable_pdl});
}

void fused_add_rmsnorm_quant(const Tensor& out, const Tensor& input, const Tensor& residual,
                             const Tensor& weight, const std::optional<Tensor>& token_scale,
                             const std::optional<Tensor>& scale, double scale_value, double eps,
                             bool enable_pdl) {
  constexpr const char* kOp = "fused_add_rmsnorm_quant";
  const Arg out_arg{kOp, "out", out}, input_arg{kOp, "input", input};
  const Arg residual_arg{kOp, "residual", residual}, weight_arg{kOp, "weight", weight};
  check_fused_add(input_arg, residual_arg, weight_arg);
  check_quant_out(out_arg, input_arg, {&residual_arg, &weight_arg});
  check_eps(kOp, eps);
  run(fused_add_entry(),
      {out_arg, input_arg, &residual_arg, weight_arg, nullptr,
       row_scale(out_arg, scale, scale_value, token_scale), eps, kNoOffset, enable_pdl});
}

void layernorm_quant(const Tensor& out, const Tensor& input, const Tensor& gamma,
                     const Tensor& beta, const std::optional<Tensor>& token_scale,
                     const std::optional<Tensor>& scale, double scale_value, double eps) {
  constexpr const char* kOp = "layernorm_quant";
  const Arg out_arg{kOp, "out", out}, input_arg{kOp, "input", input};
  const Arg gamma_arg{kOp, "gamma", gamma}, beta_arg{kOp, "beta", beta};
  check_input(input_arg);
  check_weight(gamma_arg, input_arg);
  check_weight(beta_arg, input_arg);
  check_same_dtype(beta_arg, gamma_arg);
  check_quant_out(out_arg, input_arg, {&gamma_arg, &beta_arg});
  check_eps(kOp, eps);
  run(layernorm_entry(),
      {out_arg, input_arg, nullptr, gamma_arg, &beta_arg,
       row_scale(out_arg, scale, scale_value, token_scale), eps, kNoOffset, false});
}

}  // namespace

static void schemas(Library& m) {
  m.def("rmsnorm(Tensor input, Tensor weight, float eps=1e-6, bool enable_pdl=False) -> Tensor");
  m.def(
      "gemma_rmsnorm(Tensor input, Tensor weight, float eps=1e-6, bool enable_pdl=False) -> "
      "Tensor");
  m.def(
      "rmsnorm_out(Tensor(a!) out, Tensor input, Tensor weight, float eps=1e-6, bool "
      "enable_pdl=False) "
      "-> ()");
  m.def(
      "gemma_rmsnorm_out(Tensor(a!) out, Tensor input, Tensor weight, float eps=1e-6, "
      "bool enable_pdl=False) -> ()");
  m.def(
      "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps=1e-6, "
      "bool enable_pdl=False) -> ()");
  m.def(
      "gemma_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float "
      "eps=1e-6, "
      "bool enable_pdl=False) -> ()");
  m.def("layernorm(Tensor input, Tensor gamma, Tensor beta, float eps) -> Tensor");
  m.def(
      "rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor weight, Tensor(b!)? token_scale, "
      "Tensor? scale, float scale_value, float eps, bool enable_pdl=False) -> ()");
  m.def(
      "fused_add_rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor weight, "
      "Tensor(c!)? token_scale, Tensor? scale, float scale_value, float eps, "
      "bool enable_pdl=False) -> ()");
  m.def(
      "layernorm_quant(Tensor(a!) out, Tensor input, Tensor gamma, Tensor beta, "
      "Tensor(b!)? token_scale, Tensor? scale, float scale_value, float eps) -> ()");
}

static void kernels(Library& m) {
  m.impl("rmsnorm", TORCH_BOX(&rmsnorm));
  m.impl("gemma_rmsnorm", TORCH_BOX(&gemma_rmsnorm));
  m.impl("rmsnorm_out", TORCH_BOX(&rmsnorm_out));
  m.impl("gemma_rmsnorm_out", TORCH_BOX(&gemma_rmsnorm_out));
  m.impl("fused_add_rmsnorm", TORCH_BOX(&fused_add_rmsnorm));
  m.impl("gemma_fused_add_rmsnorm", TORCH_BOX(&gemma_fused_add_rmsnorm));
  m.impl("layernorm", TORCH_BOX(&layernorm));
  m.impl("rmsnorm_quant", TORCH_BOX(&rmsnorm_quant));
  m.impl("fused_add_rmsnorm_quant", TORCH_BOX(&fused_add_rmsnorm_quant));
  m.impl("layernorm_quant", TORCH_BOX(&layernorm_quant));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
