// attention_pair, attention_pair_schedule: two batches, the segments a and b, in one launch. Each
// has queries, keys, lengths and a mask of its own; heads, head dims, dtype and the scale of the
// logits are the same. Results lie one behind the other, those of a first; on the line of the work
// list b comes first, with the lower tiles, which takes up to 4% less than the other way round.

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>

#include "ops/batch_launch.h"
#include "runtime/alloc.h"
#include "runtime/kernel.h"
#include "runtime/ops.h"
#include "runtime/workspace.h"

namespace ridgeline {
namespace {

// What both segments of a call have in common.
struct Pair {
  const Lengths &a, &b;
  BatchProblem problem_a, problem_b;
  PairPlan plan;
  ListLayout layout;
  int tag;
};

void check_pair(const Lengths& a, const Lengths& b) {
  const std::pair<int64_t, int64_t> same[] = {{a.num_qo_heads, b.num_qo_heads},
                                              {a.num_kv_heads, b.num_kv_heads},
                                              {a.head_dim_qk, b.head_dim_qk},
                                              {a.head_dim_vo, b.head_dim_vo}};
  for (const auto& [of_a, of_b] : same) {
    if (of_a != of_b) {
      fail(b.op, "q", "the heads and head dims of segment a, " + std::to_string(of_a),
           std::to_string(of_b), "Call ridgeline.attention for each");
    }
  }
  for (const Lengths* of : {&a, &b}) {
    if ((of->flags & kInvariant) != 0) {
      fail(of->op, "flags", "no batch_invariant (4)", std::to_string(of->flags),
           "Call ridgeline.attention for each");
    }
  }
  if ((a.num_tokens + b.num_tokens) * a.num_qo_heads > kMaxBatchCount) {
    fail(a.op, "q", "at most 2^30 heads of queries in both segments",
         std::to_string((a.num_tokens + b.num_tokens) * a.num_qo_heads), "Split the call");
  }
}

ListLayout layout_of(const Lengths& a, const Lengths& b) {
  return list_layout(a.batch_size + b.batch_size, a.num_tokens + b.num_tokens, a.group_size(),
                     a.num_kv_heads, false);
}

int64_t pair_list_length(const Lengths& a, const Lengths& b) {
  return layout_of(a, b).num_words + list_config(b, list_config(a, 0));
}

int pair_tag(const Lengths& a, const Lengths& b, const BatchProblem& of_a, const BatchProblem& of_b,
             const PairPlan& plan) {
  return tag_of({plan.both.dims,      plan.both.kernel,
                 plan.kernel_b,       plan.both.num_ctas,
                 plan.both.slot_rows, a.num_qo_heads,
                 a.num_kv_heads,      a.batch_size,
                 a.num_tokens,        of_a.max_q_len,
                 a.flags & ~kHnd,     a.window_left,
                 int64_t(a.form),     is_paged(a.form) ? a.page_size : 1,
                 a.single_kv_len,     b.batch_size,
                 b.num_tokens,        of_b.max_q_len,
                 b.flags & ~kHnd,     b.window_left,
                 int64_t(b.form),     b.page_size});
}

Pair pair_of(const Lengths& a, const Lengths& b, const BatchProblem& of_a, const BatchProblem& of_b,
             const Device& gpu) {
  const PairPlan plan = plan_pair(of_a, of_b, gpu_of(gpu));
  return {a, b, of_a, of_b, plan, layout_of(a, b), pair_tag(a, b, of_a, of_b, plan)};
}

void launch_schedule(const Pair& pair, const Device& gpu, int* list) {
  static Kernel& schedule = kernel(schedule_name(true, 2));
  const BatchPlan& plan = pair.plan.both;
  const auto [low_b, high_b] = heights_of(pair.plan.kernel_b);
  ScheduleParams<2> params = schedule_params<2>(
      pair.a, plan, pair.layout, pair.a.batch_size + pair.b.batch_size, list, pair.tag);
  params.segments[0] =
      schedule_segment(pair.b, pair.problem_b, plan.dims, low_b, high_b, gpu.sm, false);
  params.segments[1] =
      schedule_segment(pair.a, pair.problem_a, plan.dims, plan.low, plan.high, gpu.sm, false);
  launch(schedule, gpu,
         {.grid_x = schedule_ctas(pair.layout, pair.a, plan),
          .block = static_cast<unsigned>(schedule_threads(true))},
         &params);
}

Kernel& pair_kernel(const PairPlan& plan, bool paged, bool bf16) {
  static std::array<std::atomic<Kernel*>, kNumBatchDims * kNumBatchKernels * 8> kernels{};
  const bool low_b = plan.kernel_b == 0;
  auto& slot = kernels[(plan.both.dims * kNumBatchKernels + plan.both.kernel) * 8 + low_b * 4 +
                       paged * 2 + bf16];
  Kernel* found = slot.load(std::memory_order_acquire);
  if (!found) {
    found = &kernel(pair_name(plan.both.dims, plan.both.kernel, paged, plan.kernel_b, bf16));
    slot.store(found, std::memory_order_release);
  }
  return *found;
}

Kernel& combine_kernel(bool bf16) {
  static Kernel& of_half = kernel(pair_combine_name(false));
  static Kernel& of_bf16 = kernel(pair_combine_name(true));
  return bf16 ? of_bf16 : of_half;
}

constexpr const char* kOpA = "attention_pair, segment a";
constexpr const char* kOpB = "attention_pair, segment b";

std::tuple<Tensor, Tensor> attention_pair(
    const Tensor& q_a, const Tensor& k_a, const Tensor& v_a, const MaybeTensor& kv_indices_a,
    const MaybeTensor& qo_indptr_a, const MaybeTensor& kv_indptr_a, const MaybeTensor& kv_lens_a,
    const Tensor& q_b, const Tensor& k_b, const Tensor& v_b, const MaybeTensor& kv_indices_b,
    const MaybeTensor& qo_indptr_b, const MaybeTensor& kv_indptr_b, const MaybeTensor& kv_lens_b,
    const MaybeTensor& schedule, int64_t flags_a, int64_t flags_b, int64_t max_q_len_a,
    int64_t max_q_len_b, int64_t window_left_a, int64_t window_left_b,
    const std::optional<double>& sm_scale, double logits_soft_cap) {
  if (!kv_indices_b) {
    fail(kOpB, "kv_indices", "a tensor: the keys of segment b are paged", "None",
         "Pass the batch with another cache as segment a");
  }
  const MaybeTensor none;
  const Inputs in_a(kOpA, q_a, k_a, v_a, qo_indptr_a, kv_indptr_a, kv_indices_a, kv_lens_a, none);
  const Inputs in_b(kOpB, q_b, k_b, v_b, qo_indptr_b, kv_indptr_b, kv_indices_b, kv_lens_b, none);
  BatchOptions options_a = {flags_a, window_left_a, {}};
  BatchOptions options_b = {flags_b, window_left_b, {}};
  options_a.single = !kv_indices_a && !qo_indptr_a && !kv_indptr_a && !kv_lens_a;
  Cache cache_a, cache_b;
  const Lengths a = check_inputs(in_a, options_a, max_q_len_a, cache_a);
  const Lengths b = check_inputs(in_b, options_b, max_q_len_b, cache_b);
  check_same_device(in_b.q, in_a.q);
  check_same_dtype(in_b.q, in_a.q);
  check_pair(a, b);
  check_soft_cap(kOpA, logits_soft_cap);
  options_a.logits.sm_scale = scale_or_default(sm_scale, a.head_dim_qk);
  options_a.logits.logits_soft_cap = logits_soft_cap;
  options_b.logits = options_a.logits;

  const int64_t num_tokens = a.num_tokens + b.num_tokens;
  const Tensor out = empty(in_a.q.gpu, {num_tokens, a.num_qo_heads, a.head_dim_vo}, in_a.q.dtype);
  const Tensor lse = empty(in_a.q.gpu, {num_tokens, a.num_qo_heads}, Dtype::Float);
  if (num_tokens == 0) return {out, lse};
  const Device& gpu = device(in_a.q.gpu);
  const Pair pair =
      pair_of(a, b, problem_of(in_a, a, options_a), problem_of(in_b, b, options_b), gpu);

  std::optional<Tensor> own_list;
  const int* list = nullptr;
  if (schedule) {
    const Arg given{"attention_pair", "schedule", *schedule};
    check_list(given, pair_list_length(a, b), in_a.q);
    list = static_cast<const int*>(given.data);
  } else {
    own_list = empty(in_a.q.gpu, {pair_list_length(a, b)}, Dtype::Int);
    auto* made = static_cast<int*>(own_list->mutable_data_ptr());
    launch_schedule(pair, gpu, made);
    list = made;
  }

  const BatchPlan& plan = pair.plan.both;
  const int64_t row = a.num_qo_heads * a.head_dim_vo;
  char* const out_a = static_cast<char*>(out.mutable_data_ptr());
  auto* const lse_a = static_cast<float*>(lse.mutable_data_ptr());
  const BatchResults results_a = {out_a, row, a.head_dim_vo, lse_a};
  const BatchResults results_b = {out_a + a.num_tokens * row * in_a.q.element_size(), row,
                                  a.head_dim_vo, lse_a + a.num_tokens * a.num_qo_heads};
  BatchPairParams params = {{make_params(in_b, b, options_b, cache_b, pair.problem_b, plan, gpu,
                                         pair.layout, results_b, list),
                             make_params(in_a, a, options_a, cache_a, pair.problem_a, plan, gpu,
                                         pair.layout, results_a, list)}};
  const Workspace parts(gpu, plan.num_partial_rows * (a.head_dim_vo + 2) * int64_t{sizeof(float)},
                        0);
  for (BatchAttentionParams& of : params.segments) {
    of.tag = pair.tag;
    of.attention.partial_out = static_cast<float*>(parts.data());
    of.attention.partial_stats = of.attention.partial_out + plan.num_partial_rows * a.head_dim_vo;
  }
  // Why no programmatic launch: as in batch_launch.cpp.
  launch(pair_kernel(pair.plan, pair.problem_a.paged, pair.problem_a.bf16), gpu,
         {.grid_x = batch_grid(plan, a.num_kv_heads),
          .block = static_cast<unsigned>(plan.block),
          .dynamic_smem = static_cast<unsigned>(plan.dynamic_smem)},
         &params);
  launch(combine_kernel(pair.problem_a.bf16), gpu,
         {.grid_x = static_cast<unsigned>(2 * gpu.num_sms),
          .block = kCombineThreads,
          .pdl = gpu.sm >= 90},
         &params);
  return {out, lse};
}

constexpr const char* kScheduleA = "attention_pair_schedule, segment a";
constexpr const char* kScheduleB = "attention_pair_schedule, segment b";

Tensor attention_pair_schedule(const MaybeTensor& qo_indptr_a, const MaybeTensor& kv_indptr_a,
                               const MaybeTensor& kv_lens_a, const MaybeTensor& qo_indptr_b,
                               const Tensor& kv_indptr_b, const Tensor& kv_lens_b, int64_t flags_a,
                               int64_t flags_b, int64_t page_size_a, int64_t page_size_b,
                               int64_t num_tokens_a, int64_t num_tokens_b, int64_t num_qo_heads,
                               int64_t num_kv_heads, int64_t head_dim_qk, int64_t head_dim_vo,
                               int64_t max_q_len_a, int64_t max_q_len_b, int64_t window_left_a,
                               int64_t window_left_b, int64_t single_kv_len_a) {
  const MaybeTensor starts = kv_indptr_b, lens = kv_lens_b;
  const bool single = !qo_indptr_a && !kv_indptr_a && !kv_lens_a;
  const bool paged_a = kv_indptr_a && kv_lens_a;
  const auto lengths = [&](const char* op, const MaybeTensor& qo_indptr,
                           const MaybeTensor& kv_indptr, const MaybeTensor& kv_lens, int64_t flags,
                           int64_t page_size, int64_t num_tokens, int64_t max_q_len,
                           int64_t window_left, KvForm form) {
    return Lengths{op,          qo_indptr,  kv_indptr,    kv_lens,      flags,
                   page_size,   num_tokens, num_qo_heads, num_kv_heads, head_dim_qk,
                   head_dim_vo, max_q_len,  window_left,  form};
  };
  Lengths a =
      lengths(kScheduleA, qo_indptr_a, kv_indptr_a, kv_lens_a, flags_a, page_size_a, num_tokens_a,
              max_q_len_a, window_left_a,
              single ? KvForm::kSingle : form_of(paged_a, kv_indptr_a.has_value(), flags_a));
  Lengths b = lengths(kScheduleB, qo_indptr_b, starts, lens, flags_b, page_size_b, num_tokens_b,
                      max_q_len_b, window_left_b, form_of(true, false, flags_b));
  const Arg as{kScheduleB, "kv_indptr", kv_indptr_b};
  check_cuda(as);
  if (!single) check_length_tensors(a);
  check_lengths(a, as);
  check_lengths(b, as);
  check_pair(a, b);
  if (single) {
    if (single_kv_len_a < 0 || single_kv_len_a > kMaxBatchCount) {
      fail(kScheduleA, "single_kv_len_a", "0 to 2^30 keys", std::to_string(single_kv_len_a),
           "Pass the number of keys of the one request");
    }
    a.single_kv_len = single_kv_len_a;
  }
  const Device& gpu = device(as.gpu);
  const Tensor list = empty(as.gpu, {pair_list_length(a, b)}, Dtype::Int);
  launch_schedule(pair_of(a, b, problem_of(a), problem_of(b), gpu), gpu,
                  static_cast<int*>(list.mutable_data_ptr()));
  return list;
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "attention_pair(Tensor q_a, Tensor k_a, Tensor v_a, Tensor? kv_indices_a, "
      "Tensor? qo_indptr_a, Tensor? kv_indptr_a, Tensor? kv_lens_a, Tensor q_b, Tensor k_b, "
      "Tensor v_b, Tensor? kv_indices_b, Tensor? qo_indptr_b, Tensor? kv_indptr_b, "
      "Tensor? kv_lens_b, Tensor? schedule=None, int flags_a=0, int flags_b=0, "
      "SymInt max_q_len_a=-1, SymInt max_q_len_b=-1, SymInt window_left_a=-1, "
      "SymInt window_left_b=-1, float? sm_scale=None, float logits_soft_cap=0.0) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_pair_schedule(Tensor? qo_indptr_a, Tensor? kv_indptr_a, Tensor? kv_lens_a, "
      "Tensor? qo_indptr_b, Tensor kv_indptr_b, Tensor kv_lens_b, int flags_a, int flags_b, "
      "SymInt page_size_a, SymInt page_size_b, SymInt num_tokens_a, SymInt num_tokens_b, "
      "SymInt num_qo_heads, SymInt num_kv_heads, SymInt head_dim_qk, SymInt head_dim_vo, "
      "SymInt max_q_len_a, SymInt max_q_len_b, SymInt window_left_a, SymInt window_left_b, "
      "SymInt single_kv_len_a=0) -> Tensor");
}

static void kernels(Library& m) {
  m.impl("attention_pair", TORCH_BOX(&attention_pair));
  m.impl("attention_pair_schedule", TORCH_BOX(&attention_pair_schedule));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
