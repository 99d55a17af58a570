// single_attention, single_attention_full: checks and launch. Choice of kernel:
// attention_choice.cpp.

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention/params.h"
#include "ops/attention_choice.h"
#include "ops/attention_options.h"
#include "runtime/alloc.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/ops.h"
#include "runtime/workspace.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;
constexpr int kMaxCandidates = 16;

struct Options {
  bool causal;
  int64_t window_left;
  LogitOptions logits;
};

// Sizes and strides of a call, with k and v as [kv_len, num_kv_heads, head_dim] in either layout.
struct Shape {
  int64_t qo_len, kv_len;
  int64_t num_qo_heads, num_kv_heads;
  int64_t head_dim_qk, head_dim_vo;
  int64_t kv_len_dim, kv_head_dim;  // dimensions of k and v that count keys and heads
};

void check_head_dim(const Arg& arg) {
  const int64_t head_dim = arg.sizes.back();
  if (head_dim % 8 == 0 && head_dim >= 8 && head_dim <= kMaxHeadDim) return;
  fail(arg.op, arg.name, "a head_dim that is a multiple of 8, at most 256",
       std::to_string(head_dim), "Pad q, k and v with zeros to the next multiple of 8");
}

Shape check_inputs(const Arg& q, const Arg& k, const Arg& v, int64_t kv_layout) {
  if (kv_layout != 0 && kv_layout != 1) {
    fail(q.op, "kv_layout", "0 (NHD) or 1 (HND)", std::to_string(kv_layout), "Pass one of these");
  }
  check_cuda(q);
  check_same_device(k, q);
  check_same_device(v, q);
  check_attention_dtypes(q, k, v, device(q.gpu));
  check_rank(q, {2, 3});
  check_rank(k, {3});
  check_rank(v, {3});
  for (const Arg* arg : {&q, &k, &v}) {
    check_head_dim(*arg);
    check_last_stride(*arg);
    check_aligned16(*arg);
  }
  const size_t q_rank = q.sizes.size();
  const Shape shape = {.qo_len = q_rank == 3 ? q.sizes[0] : 1,
                       .kv_len = k.sizes[kv_layout == 0 ? 0 : 1],
                       .num_qo_heads = q.sizes[q_rank - 2],
                       .num_kv_heads = k.sizes[kv_layout == 0 ? 1 : 0],
                       .head_dim_qk = q.sizes[q_rank - 1],
                       .head_dim_vo = v.sizes[2],
                       .kv_len_dim = kv_layout == 0 ? 0 : 1,
                       .kv_head_dim = kv_layout == 0 ? 1 : 0};
  if (k.sizes[2] != shape.head_dim_qk) {
    fail(k.op, k.name, "head_dim " + std::to_string(shape.head_dim_qk) + ", as in 'q'",
         std::to_string(k.sizes[2]), "Pass the keys that belong to these queries");
  }
  check_shape(v, std::array{k.sizes[0], k.sizes[1], shape.head_dim_vo},
              "one value for each key of 'k'");
  if (shape.num_qo_heads < 1 || shape.num_kv_heads < 1 ||
      shape.num_qo_heads % shape.num_kv_heads != 0) {
    fail(q.op, q.name,
         "a number of heads that is a multiple of the " + std::to_string(shape.num_kv_heads) +
             " of 'k'",
         std::to_string(shape.num_qo_heads),
         "Check kv_layout: NHD is [kv_len, heads, head_dim], HND [heads, kv_len, head_dim]");
  }
  if (shape.qo_len * shape.num_qo_heads > kMaxCount) {
    fail(q.op, q.name, "fewer than 2^31 heads of queries",
         std::to_string(shape.qo_len * shape.num_qo_heads), "Split the call");
  }
  // Why half: positions of queries, and keys rounded up to a whole tile, must not overflow.
  if (shape.kv_len > kMaxCount / 2) {
    fail(k.op, k.name, "fewer than 2^30 keys", std::to_string(shape.kv_len),
         "Attend to parts of them, and merge the results with ridgeline.merge_state");
  }
  return shape;
}

// The kernels of this family by place in the table, found by name on first use.
Kernel& attention_kernel(int candidate, bool bf16, int variant) {
  static std::array<std::atomic<Kernel*>, kMaxCandidates * 2 * kNumAttentionVariants> kernels{};
  auto& slot = kernels[(candidate * 2 + bf16) * kNumAttentionVariants + variant];
  Kernel* found = slot.load(std::memory_order_acquire);
  if (!found) {
    found = &kernel(attention_name(candidate, bf16, variant));
    slot.store(found, std::memory_order_release);
  }
  return *found;
}

Kernel& combine_kernel(bool bf16) {
  static Kernel& of_half = kernel(combine_name(false));
  static Kernel& of_bf16 = kernel(combine_name(true));
  return bf16 ? of_bf16 : of_half;
}

AttentionParams make_params(const Arg& q, const Arg& k, const Arg& v, const Tensor& out, float* lse,
                            const Shape& shape, const Options& options, const AttentionPlan& plan) {
  const size_t q_rank = q.sizes.size();
  // A window that reaches every key is none; so it fits 32 bits.
  const int64_t window =
      options.window_left > shape.kv_len + shape.qo_len ? -1 : options.window_left;
  return {.q = q.data,
          .k = k.data,
          .v = v.data,
          .out = out.mutable_data_ptr(),
          .lse = lse,
          .partial_out = nullptr,
          .partial_stats = nullptr,
          .counters = nullptr,
          .q_stride_token = q_rank == 3 ? q.strides[0] : 0,
          .q_stride_head = q.strides[q_rank - 2],
          .k_stride_token = k.strides[shape.kv_len_dim],
          .k_stride_head = k.strides[shape.kv_head_dim],
          .v_stride_token = v.strides[shape.kv_len_dim],
          .v_stride_head = v.strides[shape.kv_head_dim],
          .out_stride_token = shape.num_qo_heads * shape.head_dim_vo,
          .out_stride_head = shape.head_dim_vo,
          .qo_len = static_cast<int>(shape.qo_len),
          .kv_len = static_cast<int>(shape.kv_len),
          .num_qo_heads = static_cast<int>(shape.num_qo_heads),
          .head_dim_qk = static_cast<int>(shape.head_dim_qk),
          .head_dim_vo = static_cast<int>(shape.head_dim_vo),
          .num_q_tiles = plan.num_q_tiles,
          .window_left = static_cast<int>(window),
          .causal = options.causal,
          .num_kv_heads = make_divider(static_cast<uint32>(shape.num_kv_heads)),
          .num_splits = make_divider(static_cast<uint32>(plan.num_splits)),
          .group_size = make_divider(static_cast<uint32>(shape.num_qo_heads / shape.num_kv_heads)),
          .sm_scale = static_cast<float>(options.logits.sm_scale),
          .logits_soft_cap = static_cast<float>(options.logits.logits_soft_cap),
          .rope_turns = rope_turns(options.logits),
          .rope_ratio = rope_ratio(options.logits, shape.head_dim_qk)};
}

// Launches the kernel, and the one that adds up the parts when there are several.
void run(const Arg& q, const Arg& k, const Arg& v, const Tensor& out, float* lse,
         const Shape& shape, const Options& options) {
  if (shape.qo_len == 0) return;
  const Device& gpu = device(q.gpu);
  const AttentionProblem problem = {.bf16 = q.dtype == Dtype::BFloat16,
                                    .head_dim_qk = static_cast<int>(shape.head_dim_qk),
                                    .head_dim_vo = static_cast<int>(shape.head_dim_vo),
                                    .qo_len = shape.qo_len,
                                    .kv_len = shape.kv_len,
                                    .num_qo_heads = shape.num_qo_heads,
                                    .num_kv_heads = shape.num_kv_heads,
                                    .causal = options.causal,
                                    .window_left = options.window_left,
                                    .rotates = options.logits.rotates,
                                    .fp16_logits = options.logits.fp16_logits};
  const AttentionPlan plan =
      plan_attention(problem, {gpu.sm, gpu.num_sms, gpu.max_dynamic_smem + 1024});
  AttentionParams params = make_params(q, k, v, out, lse, shape, options, plan);

  const int64_t num_ctas = int64_t{plan.num_q_tiles} * shape.num_kv_heads * plan.num_splits;
  if (num_ctas > kMaxCount) {
    fail(q.op, q.name, "fewer than 2^31 tiles of work", std::to_string(num_ctas), "Split the call");
  }
  const bool is_cut = plan.num_splits > 1;
  std::optional<Workspace> parts;
  if (is_cut) {
    const int64_t num_rows = num_ctas * plan.tile_q;
    const int num_tiles = plan.num_q_tiles * static_cast<int>(shape.num_kv_heads);
    parts.emplace(gpu, num_rows * (shape.head_dim_vo + 2) * int64_t{sizeof(float)},
                  plan.in_one_launch ? num_tiles : 0);
    params.partial_out = static_cast<float*>(parts->data());
    params.partial_stats = params.partial_out + num_rows * shape.head_dim_vo;
    params.counters = parts->counters();
  }
  launch(attention_kernel(plan.candidate, problem.bf16, attention_variant(problem)), gpu,
         {.grid_x = static_cast<unsigned>(num_ctas),
          .block = static_cast<unsigned>(plan.block),
          .dynamic_smem = static_cast<unsigned>(plan.dynamic_smem)},
         &params);
  if (!is_cut || params.counters) return;

  const CombineParams combine = {params, plan.tile_q};
  const int64_t num_rows = shape.qo_len * shape.num_qo_heads;
  launch(
      combine_kernel(problem.bf16), gpu,
      {.grid_x = static_cast<unsigned>(combine_ctas(plan.num_splits, static_cast<int>(num_rows))),
       .block = kCombineThreads,
       .pdl = gpu.sm >= 90},
      &combine);
}

Tensor empty_out(const Arg& q, int64_t head_dim_vo) {
  if (q.rank() == 2) return empty(q.gpu, {q.sizes[0], head_dim_vo}, q.dtype);
  return empty(q.gpu, {q.sizes[0], q.sizes[1], head_dim_vo}, q.dtype);
}

Tensor single_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                        std::optional<double> sm_scale, int64_t kv_layout, int64_t window_left,
                        double logits_soft_cap) {
  constexpr const char* kOp = "single_attention";
  const Arg query(kOp, "q", q), keys(kOp, "k", k), values(kOp, "v", v);
  const Shape shape = check_inputs(query, keys, values, kv_layout);
  check_window(kOp, window_left);
  check_soft_cap(kOp, logits_soft_cap);
  const Options options = {causal && shape.qo_len > 1,
                           window_left,
                           {.sm_scale = scale_or_default(sm_scale, shape.head_dim_qk),
                            .logits_soft_cap = logits_soft_cap}};
  const Tensor out = empty_out(query, shape.head_dim_vo);
  run(query, keys, values, out, nullptr, shape, options);
  return out;
}

Tensor single_attention_plain(const Tensor& q, const Tensor& k, const Tensor& v) {
  return single_attention(q, k, v, true, std::nullopt, 0, -1, 0.0);
}

std::tuple<Tensor, Tensor> single_attention_full(
    const Tensor& q, const Tensor& k, const Tensor& v, bool causal, std::optional<double> sm_scale,
    int64_t kv_layout, int64_t window_left, double logits_soft_cap, int64_t pos_encoding_mode,
    double rope_scale, double rope_theta, bool use_fp16_qk_reduction,
    const MaybeTensor& custom_mask, const MaybeTensor& mask_indptr, const MaybeTensor& q_scale,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, const MaybeTensor& sinks,
    const std::optional<std::vector<Tensor>>& extra_tensors,
    const std::optional<std::vector<double>>& extra_scalars) {
  constexpr const char* kOp = "single_attention_full";
  refuse_later(kOp, custom_mask, mask_indptr, q_scale, k_scale, v_scale, sinks, extra_tensors,
               extra_scalars);
  const Arg query(kOp, "q", q), keys(kOp, "k", k), values(kOp, "v", v);
  const Shape shape = check_inputs(query, keys, values, kv_layout);
  check_window(kOp, window_left);
  const Options options = {
      causal, window_left,
      logit_options(query, scale_or_default(sm_scale, shape.head_dim_qk), logits_soft_cap,
                    pos_encoding_mode, rope_scale, rope_theta, use_fp16_qk_reduction)};
  const Tensor out = empty_out(query, shape.head_dim_vo);
  const Tensor lse = empty(query.gpu, query.sizes.first(query.sizes.size() - 1), Dtype::Float);
  run(query, keys, values, out, static_cast<float*>(lse.mutable_data_ptr()), shape, options);
  return {out, lse};
}

}  // namespace

// An op for calls without options, one for few options and the full one, since each argument costs
// host time. Why causal without asking: a single query sees the same keys either way.
static void schemas(Library& m) {
  m.def("single_attention_plain(Tensor q, Tensor k, Tensor v) -> Tensor");
  m.def(
      "single_attention(Tensor q, Tensor k, Tensor v, bool causal=False, float? sm_scale=None, "
      "int kv_layout=0, SymInt window_left=-1, float logits_soft_cap=0.0) -> Tensor");
  m.def(
      "single_attention_full(Tensor q, Tensor k, Tensor v, bool causal, float? sm_scale, "
      "int kv_layout, SymInt window_left, float logits_soft_cap, int pos_encoding_mode, "
      "float rope_scale, float rope_theta, bool use_fp16_qk_reduction, Tensor? custom_mask=None, "
      "Tensor? mask_indptr=None, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, Tensor[]? extra_tensors=None, float[]? extra_scalars=None) "
      "-> (Tensor, Tensor)");
}

static void kernels(Library& m) {
  m.impl("single_attention_plain", TORCH_BOX(&single_attention_plain));
  m.impl("single_attention", TORCH_BOX(&single_attention));
  m.impl("single_attention_full", TORCH_BOX(&single_attention_full));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
