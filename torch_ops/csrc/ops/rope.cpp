// apply_rope_pos_ids, in place or not: schemas, checks, frequencies, choice of kernel, launch.

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <tuple>
#include <vector>

#include "rope/params.h"
#include "runtime/access.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxRotaryDim = 2 * kRopeMaxPairs;
constexpr const char* kPosIds = "rope/apply_rope_pos_ids.cuh:apply_rope_pos_ids";
constexpr std::array kPairings = {"HalfSplit", "Interleaved"};

auto pos_ids_name(bool interleave) {
  return [=](const Access& access) {
    return kernel_name(kPosIds, device_type(access.dtype), access.vec_size, kPairings[interleave]);
  };
}

Kernel& pos_ids_kernel(Dtype dtype, int vec_size, bool interleave) {
  static const std::array kernels = {AccessKernels(pos_ids_name(false)),
                                     AccessKernels(pos_ids_name(true))};
  return kernels[interleave].of(dtype, vec_size);
}

std::vector<Row> rope_rows() {
  std::vector<Row> rows;
  for (const bool interleave : {false, true}) {
    add_access_rows(rows, "apply_rope_pos_ids", pos_ids_name(interleave), kRopeMaxThreads);
  }
  return rows;
}

Choice rope_choose(const std::string&, const Config& config, int) {
  return choose_access(config, pos_ids_name(config.get_int("interleave", 0) != 0));
}

const RegisterFamily family({{"apply_rope_pos_ids", "apply_rope_pos_ids_inplace"},
                             rope_rows,
                             rope_choose});

struct RopeOptions {
  int64_t rotary_dim;
  bool interleave;
  double rope_scale;
  double rope_theta;
};

void check_heads(const Arg& x) {
  check_rank(x, {3});
  check_last_stride(x);
}

void check_arguments(const Arg& q, const Arg& k, const Arg& pos_ids, const RopeOptions& options) {
  check_cuda(q);
  check_dtype(q, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_heads(q);
  const int64_t nnz = q.sizes[0], head_dim = q.sizes[2];
  check_same_device(k, q);
  check_same_dtype(k, q);
  check_heads(k);
  check_shape(k, std::array{nnz, k.sizes[1], head_dim}, "[nnz, num_k_heads, head_dim], as q's");
  check_same_device(pos_ids, q);
  check_dtype(pos_ids, {Dtype::Int, Dtype::Long});
  check_rank(pos_ids, {1});
  check_shape(pos_ids, std::array{nnz}, "[nnz]");
  check_last_stride(pos_ids);
  if (nnz > kMaxTokens) {
    fail(q.op, q.name, "fewer than 2^31 tokens", std::to_string(nnz), "Split the call");
  }
  if (options.rotary_dim % 2 != 0 || options.rotary_dim <= 0 ||
      options.rotary_dim > std::min(head_dim, kMaxRotaryDim)) {
    fail(q.op, "rotary_dim",
         "an even number from 2 to head_dim (" + std::to_string(head_dim) + ") and at most " +
             std::to_string(kMaxRotaryDim),
         std::to_string(options.rotary_dim), "Leave it out to rotate whole heads");
  }
  for (const auto& [name, value] :
       {std::pair{"rope_scale", options.rope_scale}, std::pair{"rope_theta", options.rope_theta}}) {
    if (std::isfinite(value) && value > 0) continue;
    fail(q.op, name, "a finite number > 0", std::to_string(value), "The defaults are 1 and 1e4");
  }
}

// Turns per position of each pair, modulo 1, in units of 2^-64 (rope/params.h). A model calls with
// one set of options, so each thread keeps the last.
const std::vector<uint64>& turns_per_position(const RopeOptions& options) {
  thread_local std::vector<uint64> turns;
  thread_local double scale = 0, theta = 0;
  const auto num_pairs = static_cast<size_t>(options.rotary_dim / 2);
  if (turns.size() == num_pairs && scale == options.rope_scale && theta == options.rope_theta) {
    return turns;
  }
  turns.resize(num_pairs);
  for (size_t i = 0; i < num_pairs; ++i) {
    const double exponent = -static_cast<double>(i) / static_cast<double>(num_pairs);
    const double frequency = std::pow(options.rope_theta, exponent) / options.rope_scale;
    const double turn = frequency / (2 * std::numbers::pi);
    turns[i] = static_cast<uint64>(std::ldexp(turn - std::floor(turn), 64));
  }
  scale = options.rope_scale;
  theta = options.rope_theta;
  return turns;
}

RopeTensor rope_tensor(const Arg& input, const Arg& output) {
  return {.input = input.data,
          .output = output.tensor.mutable_data_ptr(),
          .input_token_stride = input.strides[0],
          .input_head_stride = input.strides[1],
          .output_token_stride = output.strides[0],
          .output_head_stride = output.strides[1]};
}

void run_pos_ids(const Arg& q, const Arg& k, const Arg& q_out, const Arg& k_out, const Arg& pos_ids,
                 const RopeOptions& options, bool in_place) {
  const int64_t nnz = q.sizes[0], num_heads = q.sizes[1] + k.sizes[1], head_dim = q.sizes[2];
  if (nnz == 0 || num_heads == 0) return;
  const int vec_size = access_width({&q, &k, &q_out, &k_out}, {options.rotary_dim / 2, head_dim});
  const int64_t num_copied = in_place ? 0 : head_dim - options.rotary_dim;
  const auto num_pairs = static_cast<uint32>(options.rotary_dim / 2);
  const RopePlan plan = rope_plan(static_cast<uint32>(num_heads), num_pairs, vec_size);

  RopePosIdsParams params;
  params.q = rope_tensor(q, q_out);
  params.k = rope_tensor(k, k_out);
  params.pos_ids = pos_ids.data;
  params.pos_ids_are_int64 = pos_ids.dtype == Dtype::Long;
  params.shape = {.nnz = static_cast<uint32>(nnz),
                  .num_q_heads = static_cast<uint32>(q.sizes[1]),
                  .num_heads = static_cast<uint32>(num_heads),
                  .num_pairs = num_pairs,
                  .num_copied_vecs = static_cast<uint32>(num_copied / vec_size),
                  .tokens_per_block = plan.tokens_per_block,
                  .head_step = plan.head_step,
                  .lanes_per_head = make_divider(plan.lanes_per_head),
                  .threads_per_token = make_divider(plan.threads_per_token)};
  std::ranges::copy(turns_per_position(options), params.turns);
  const auto blocks =
      static_cast<unsigned>((nnz + plan.tokens_per_block - 1) / plan.tokens_per_block);
  launch(pos_ids_kernel(q.dtype, vec_size, options.interleave), device(q.gpu),
         {.grid_x = blocks, .block = plan.block}, &params);
}

std::tuple<Tensor, Tensor> apply_rope_pos_ids(const Tensor& q, const Tensor& k,
                                              const Tensor& pos_ids, int64_t rotary_dim,
                                              bool interleave, double rope_scale,
                                              double rope_theta) {
  constexpr const char* kOp = "apply_rope_pos_ids";
  const RopeOptions options{rotary_dim, interleave, rope_scale, rope_theta};
  const Arg q_arg{kOp, "q", q}, k_arg{kOp, "k", k}, pos_ids_arg{kOp, "pos_ids", pos_ids};
  check_arguments(q_arg, k_arg, pos_ids_arg, options);
  const Tensor q_out = empty_like(q_arg);
  const Tensor k_out = empty_like(k_arg);
  run_pos_ids(q_arg, k_arg, {kOp, "q_out", q_out}, {kOp, "k_out", k_out}, pos_ids_arg, options,
              false);
  return {q_out, k_out};
}

void apply_rope_pos_ids_inplace(const Tensor& q, const Tensor& k, const Tensor& pos_ids,
                                int64_t rotary_dim, bool interleave, double rope_scale,
                                double rope_theta) {
  constexpr const char* kOp = "apply_rope_pos_ids_inplace";
  const RopeOptions options{rotary_dim, interleave, rope_scale, rope_theta};
  const Arg q_arg{kOp, "q", q}, k_arg{kOp, "k", k}, pos_ids_arg{kOp, "pos_ids", pos_ids};
  check_arguments(q_arg, k_arg, pos_ids_arg, options);
  check_writable(q_arg);
  check_writable(k_arg);
  check_distinct(k_arg, q_arg);
  run_pos_ids(q_arg, k_arg, q_arg, k_arg, pos_ids_arg, options, true);
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "apply_rope_pos_ids(Tensor q, Tensor k, Tensor pos_ids, SymInt rotary_dim, "
      "bool interleave=False, float rope_scale=1.0, float rope_theta=1e4) -> (Tensor, Tensor)");
  m.def(
      "apply_rope_pos_ids_inplace(Tensor(a!) q, Tensor(b!) k, Tensor pos_ids, SymInt rotary_dim, "
      "bool interleave=False, float rope_scale=1.0, float rope_theta=1e4) -> ()");
}

static void kernels(Library& m) {
  m.impl("apply_rope_pos_ids", TORCH_BOX(&apply_rope_pos_ids));
  m.impl("apply_rope_pos_ids_inplace", TORCH_BOX(&apply_rope_pos_ids_inplace));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
