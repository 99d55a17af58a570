// attention, attention_full, attention_schedule: schemas, checks, launch. Choice of kernel:
// batch_choice.cpp.

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <initializer_list>
#include <numbers>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/batch_choice.h"
#include "runtime/alloc.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxCount = int64_t{1} << 30;
constexpr int64_t kTagSizes = 1021;  // a list's length tells that many configurations apart

using MaybeTensor = std::optional<Tensor>;

// The argument `flags`, as torch_ops/batch_attention.py has it.
enum Flag : int64_t { kHnd = 1, kCausal = 2, kInvariant = 4, kLensAreTokens = 8 };

struct BatchOptions {
  int64_t flags = 0;
  int64_t window_left = -1;
  double logits_soft_cap = 0.0;
  double sm_scale = 1.0;
  bool rotates = false;
  double rope_scale = 1.0;
  double rope_theta = 1e4;
  bool fp16_logits = false;

  bool has(Flag flag) const { return (flags & flag) != 0; }
};

// What the scheduler is asked for; from index tensors and head counts.
struct Lengths {
  const char* op;
  const MaybeTensor& qo_indptr;
  const MaybeTensor& kv_indptr;
  const MaybeTensor& kv_lens;
  int64_t flags;
  int64_t page_size;
  int64_t num_tokens;
  int64_t num_qo_heads, num_kv_heads;
  int64_t head_dim_qk, head_dim_vo;
  int64_t max_q_len;
  int64_t window_left;

  KvForm form() const {
    if (!kv_indptr) return KvForm::kPadded;
    if (!kv_lens) return KvForm::kRagged;
    return (flags & kLensAreTokens) != 0 ? KvForm::kPagedByLength : KvForm::kPagedByLastPage;
  }
  int64_t batch_size() const {
    if (qo_indptr) return qo_indptr->size(0) - 1;
    return num_tokens;
  }
  int64_t group_size() const { return num_qo_heads / num_kv_heads; }
};

const int* ints(const MaybeTensor& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

void check_index(const char* op, const char* name, const MaybeTensor& tensor, const Arg& as,
                 int64_t length, const char* meaning) {
  if (!tensor) return;
  const Arg arg{op, name, *tensor};
  check_same_device(arg, as);
  check_dtype(arg, {Dtype::Int});
  check_rank(arg, {1});
  check_last_stride(arg);
  if (length >= 0) check_shape(arg, std::array{length}, meaning);
}

void check_lengths(const Lengths& of, const Arg& as) {
  check_index(of.op, "qo_indptr", of.qo_indptr, as, -1, "");
  if (of.qo_indptr && of.qo_indptr->size(0) < 1) {
    fail(of.op, "qo_indptr", "batch_size + 1 elements", "none", "An empty batch has [0]");
  }
  if (!of.kv_indptr && !of.kv_lens) {
    fail(of.op, "kv_indptr", "kv_indptr (ragged or paged keys) or kv_lens (padded keys)",
         "neither of them", "Pass the tensor that tells where each request's keys are");
  }
  check_index(of.op, "kv_indptr", of.kv_indptr, as, of.batch_size() + 1, "[batch_size + 1]");
  check_index(of.op, "kv_lens", of.kv_lens, as, of.batch_size(), "[batch_size]");
  if (of.num_qo_heads < 1 || of.num_kv_heads < 1 || of.num_qo_heads % of.num_kv_heads != 0) {
    fail(of.op, "num_qo_heads",
         "a multiple of the " + std::to_string(of.num_kv_heads) + " heads of the keys",
         std::to_string(of.num_qo_heads),
         "Check kv_layout: NHD is [..., tokens, heads, head_dim], HND [..., heads, tokens, "
         "head_dim]");
  }
  for (const auto& [name, value] :
       {std::pair{"head_dim_qk", of.head_dim_qk}, std::pair{"head_dim_vo", of.head_dim_vo}}) {
    if (value % 8 != 0 || value < 8 || value > kMaxHeadDim) {
      fail(of.op, name, "a multiple of 8, at most 256", std::to_string(value),
           "Pad q, k and v with zeros to the next multiple of 8");
    }
  }
  if (of.page_size < 1 || of.page_size > kMaxCount) {
    fail(of.op, "page_size", "at least 1", std::to_string(of.page_size),
         "Pass the tokens that a page holds");
  }
  if (of.max_q_len < -1) {
    fail(of.op, "max_q_len", "at least 0, or -1 where it is not known",
         std::to_string(of.max_q_len), "Leave it out");
  }
  if (of.window_left < -1) {
    fail(of.op, "window_left", "at least -1", std::to_string(of.window_left), "-1 turns it off");
  }
  if (of.num_tokens < 0 || of.num_tokens * of.num_qo_heads > kMaxCount) {
    fail(of.op, "q", "at most 2^30 heads of queries",
         std::to_string(of.num_tokens * of.num_qo_heads), "Split the call");
  }
}

BatchProblem problem_of(const Lengths& of) {
  BatchProblem problem;
  problem.head_dim_qk = static_cast<int>(of.head_dim_qk);
  problem.head_dim_vo = static_cast<int>(of.head_dim_vo);
  problem.batch_size = of.batch_size();
  problem.num_tokens = of.num_tokens;
  const int64_t most = of.qo_indptr ? of.num_tokens : 1;
  problem.max_q_len = of.max_q_len < 0 ? most : std::min(of.max_q_len, most);
  problem.num_qo_heads = of.num_qo_heads;
  problem.num_kv_heads = of.num_kv_heads;
  problem.invariant = (of.flags & kInvariant) != 0;
  return problem;
}

int window_of(int64_t window_left) {
  return window_left >= kMaxCount ? -1 : static_cast<int>(window_left);
}

// Of everything that a list depends on beside the contents of the index tensors.
int tag_of(const Lengths& of, const BatchProblem& problem, const BatchPlan& plan) {
  uint64_t hash = 14695981039346656037ull;
  const int64_t given[] = {plan.dims,
                           plan.kernel,
                           plan.num_ctas,
                           plan.slot_rows,
                           of.batch_size(),
                           of.num_tokens,
                           of.num_qo_heads,
                           of.num_kv_heads,
                           problem.max_q_len,
                           of.flags & ~kHnd,
                           of.window_left,
                           int64_t(of.form()),
                           is_paged(of.form()) ? of.page_size : 1};
  for (const int64_t value : given) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211ull;
  }
  return static_cast<int>(static_cast<uint32_t>(hash ^ (hash >> 32)) | 1u);
}

// As torch_ops/batch_attention.py has it, for the fakes.
int64_t list_length(const Lengths& of) {
  const ListLayout layout = list_layout(of.batch_size(), of.num_tokens, of.group_size(),
                                        of.num_kv_heads, (of.flags & kInvariant) != 0);
  const int64_t page_size = is_paged(of.form()) ? of.page_size : 1;
  int64_t config = of.num_qo_heads;
  for (const int64_t value : {of.num_kv_heads, of.head_dim_qk, of.head_dim_vo,
                              of.flags & (kCausal | kInvariant | kLensAreTokens), page_size}) {
    config = (config * 31 + value) % kTagSizes;
  }
  return layout.num_words + config;
}

BatchGpu gpu_of(const Device& gpu) {
  return {gpu.sm, gpu.num_sms, gpu.max_dynamic_smem + 1024};
}

void launch_schedule(const Lengths& of, const BatchProblem& problem, const BatchPlan& plan,
                     const Device& gpu, const Tensor& list) {
  static Kernel& of_low = kernel(schedule_name(false));
  static Kernel& of_tall = kernel(schedule_name(true));
  const ListLayout layout = list_layout(problem.batch_size, problem.num_tokens, of.group_size(),
                                        problem.num_kv_heads, problem.invariant);
  if (layout.max_records > kMaxCount) {
    fail(of.op, "q", "fewer than 2^30 tiles of work", std::to_string(layout.max_records),
         "Split the call");
  }
  const int num_teams = plan.num_ctas / plan.team_size;
  const int64_t num_bundles = of.num_kv_heads / plan.team_size;
  const ScheduleParams params = {.qo_indptr = ints(of.qo_indptr),
                                 .kv_indptr = ints(of.kv_indptr),
                                 .kv_lens = ints(of.kv_lens),
                                 .list = static_cast<int*>(list.mutable_data_ptr()),
                                 .records_at = layout.records_at,
                                 .requests_at = layout.requests_at,
                                 .items_at = layout.items_at,
                                 .costs_at = layout.costs_at,
                                 .item_starts_at = layout.item_starts_at,
                                 .max_items = static_cast<int>(layout.max_items),
                                 .batch_size = static_cast<int>(problem.batch_size),
                                 .num_tokens = static_cast<int>(problem.num_tokens),
                                 .max_q_len = static_cast<int>(problem.max_q_len),
                                 .form = of.form(),
                                 .page_size = static_cast<int>(of.page_size),
                                 .causal = (of.flags & kCausal) != 0,
                                 .window_left = window_of(of.window_left),
                                 .num_teams = num_teams,
                                 .team_count = make_divider(static_cast<uint32>(num_teams)),
                                 .team_size = plan.team_size,
                                 .num_bundles = make_divider(static_cast<uint32>(num_bundles)),
                                 .max_tiles = plan.max_tiles,
                                 .num_heights = plan.low == plan.high ? 1 : 2,
                                 .heights = {tile_height(plan.dims, plan.low, gpu.sm),
                                             tile_height(plan.dims, plan.high, gpu.sm)},
                                 .group_size = make_divider(static_cast<uint32>(of.group_size())),
                                 .invariant = problem.invariant,
                                 .slot_rows = plan.slot_rows,
                                 .tag = tag_of(of, problem, plan)};
  const bool tall = plan.high > 16;
  const int threads = schedule_threads(tall);
  const int64_t ctas = (layout.max_items * num_bundles + num_teams) / threads + 1;
  launch(tall ? of_tall : of_low, gpu,
         {.grid_x = static_cast<unsigned>(std::min<int64_t>(ctas, kMaxScheduleCtas)),
          .block = static_cast<unsigned>(threads)},
         &params);
}

Tensor attention_schedule(const MaybeTensor& qo_indptr, const MaybeTensor& kv_indptr,
                          const MaybeTensor& kv_lens, int64_t flags, int64_t page_size,
                          int64_t num_qo_tokens, int64_t num_qo_heads, int64_t num_kv_heads,
                          int64_t head_dim_qk, int64_t head_dim_vo, int64_t max_q_len,
                          int64_t window_left) {
  constexpr const char* kOp = "attention_schedule";
  const Lengths of = {kOp,         qo_indptr,     kv_indptr,    kv_lens,      flags,
                      page_size,   num_qo_tokens, num_qo_heads, num_kv_heads, head_dim_qk,
                      head_dim_vo, max_q_len,     window_left};
  const Arg as = kv_indptr ? Arg{kOp, "kv_indptr", *kv_indptr}
                 : kv_lens ? Arg{kOp, "kv_lens", *kv_lens}
                           : Arg{kOp, "qo_indptr", *qo_indptr};
  check_cuda(as);
  check_lengths(of, as);
  const Device& gpu = device(as.gpu);
  const BatchProblem problem = problem_of(of);
  const Tensor list = empty(as.gpu, {list_length(of)}, Dtype::Int);
  launch_schedule(of, problem, plan_batch(problem, gpu_of(gpu)), gpu, list);
  return list;
}

// The cache as tokens of heads, whatever its form and layout.
struct Cache {
  int64_t outer;   // pages, or rows of the batch; 1 when ragged
  int64_t tokens;  // of a page, of a row, or of all requests
  int64_t num_heads;
  int outer_dim, token_dim, head_dim;  // -1: there is none
};

Cache cache_of(const Arg& k, bool ragged, bool hnd) {
  const int first = ragged ? 0 : 1;
  const int token_dim = first + (hnd ? 1 : 0);
  const int head_dim = first + (hnd ? 0 : 1);
  return {ragged ? 1 : k.sizes[0], k.sizes[token_dim], k.sizes[head_dim],
          ragged ? -1 : 0,         token_dim,          head_dim};
}

struct Units {
  uint32 page, token, unit;
};

// Strides of a pool in units that divide them, so that places in it fit 32 bits.
Units units_of(const Arg& arg, const Cache& cache) {
  const int64_t page = cache.outer > 1 ? arg.strides[cache.outer_dim] : 0;
  const int64_t token = cache.tokens > 1 ? arg.strides[cache.token_dim] : 0;
  const int64_t both = page | token;
  const int64_t unit = both == 0 ? 1 : std::min(both & -both, int64_t{1} << 30);
  if (page < 0 || token < 0 ||
      (page / unit) * cache.outer + (token / unit) * cache.tokens >= int64_t{1} << 32) {
    fail(arg.op, arg.name,
         "a pool of fewer than 2^32 times the largest power of two that divides "
         "its strides",
         "strides of " + std::to_string(page) + " and " + std::to_string(token) + " elements",
         "Use a head_dim times heads that is a multiple of a larger power of two");
  }
  return {static_cast<uint32>(page / unit), static_cast<uint32>(token / unit),
          static_cast<uint32>(unit)};
}

void check_cache(const Arg& q, const Arg& k, const Arg& v, int64_t rank, const Device& gpu) {
  check_same_device(k, q);
  check_same_device(v, q);
  if (q.dtype == Dtype::Float) {
    fail(q.op, q.name, "dtype torch.float16 or torch.bfloat16 on a GPU", "torch.float32",
         "Convert q, k and v with .to(torch.float16): tensor cores sum in float32 all the same");
  }
  check_dtype(q, {Dtype::Half, Dtype::BFloat16});
  check_same_dtype(k, q);
  check_same_dtype(v, q);
  if (q.dtype == Dtype::BFloat16 && gpu.sm < 80) {
    fail(q.op, q.name,
         "dtype torch.float16 on GPUs before compute capability 8.0, which have no bf16 tensor "
         "cores",
         "torch.bfloat16", "Convert q, k and v with .to(torch.float16)");
  }
  check_rank(q, {3});
  check_rank(k, {rank});
  check_rank(v, {rank});
  for (const Arg* arg : {&q, &k, &v}) {
    check_last_stride(*arg);
    check_aligned16(*arg);
  }
  const int64_t last = rank - 1;
  if (k.sizes[last] != q.sizes[2]) {
    fail(k.op, k.name, "head_dim " + std::to_string(q.sizes[2]) + ", as in 'q'",
         std::to_string(k.sizes[last]), "Pass the keys that belong to these queries");
  }
  for (int64_t dim = 0; dim < last; ++dim) {
    if (k.sizes[dim] != v.sizes[dim]) {
      fail(v.op, v.name, "the leading dimensions of 'k', " + shape_text(k.tensor),
           shape_text(v.tensor), "Pass one value for each key");
    }
  }
}

struct Inputs {
  const Arg q, k, v;
  const MaybeTensor& qo_indptr;
  const MaybeTensor& kv_indptr;
  const MaybeTensor& kv_indices;
  const MaybeTensor& kv_lens;
  const MaybeTensor& schedule;
};

Kernel& attention_kernel(const BatchPlan& plan, bool paged, bool bf16, int variant) {
  static std::array<std::atomic<Kernel*>, kNumBatchDims * kNumBatchKernels * kNumBatchVariants * 4>
      kernels{};
  auto& slot =
      kernels[((plan.dims * kNumBatchKernels + plan.kernel) * kNumBatchVariants + variant) * 4 +
              paged * 2 + bf16];
  Kernel* found = slot.load(std::memory_order_acquire);
  if (!found) {
    found = &kernel(batch_name(plan.dims, plan.kernel, paged, bf16, variant));
    slot.store(found, std::memory_order_release);
  }
  return *found;
}

Kernel& combine_kernel(bool bf16) {
  static Kernel& of_half = kernel(batch_combine_name(false));
  static Kernel& of_bf16 = kernel(batch_combine_name(true));
  return bf16 ? of_bf16 : of_half;
}

void check_options(const char* op, const BatchOptions& options) {
  if (options.flags < 0 || options.flags > 15) {
    fail(op, "flags",
         "a sum of 1 (HND), 2 (causal), 4 (batch_invariant) and 8 (kv_lens of paged "
         "keys are tokens)",
         std::to_string(options.flags), "Call ridgeline.attention");
  }
  if (!(options.logits_soft_cap >= 0.0)) {
    fail(op, "logits_soft_cap", "a positive number, or 0", std::to_string(options.logits_soft_cap),
         "0 turns it off");
  }
  for (const auto& [name, value] :
       {std::pair{"rope_scale", options.rope_scale}, std::pair{"rope_theta", options.rope_theta}}) {
    if (!(value > 0.0)) {
      fail(op, name, "a positive number", std::to_string(value), "Leave it out for the default");
    }
  }
}

BatchAttentionParams make_params(const Inputs& in, const Lengths& of, const BatchOptions& options,
                                 const Cache& cache, const BatchPlan& plan, const Tensor& out,
                                 float* lse, const Tensor& list) {
  const Arg &q = in.q, &k = in.k, &v = in.v;
  const KvForm form = of.form();
  BatchAttentionParams params = {};
  AttentionParams& attention = params.attention;
  attention.q = q.data;
  attention.k = k.data;
  attention.v = v.data;
  attention.out = out.mutable_data_ptr();
  attention.lse = lse;
  attention.q_stride_token = q.strides[0];
  attention.q_stride_head = q.strides[1];
  attention.k_stride_token = k.strides[cache.token_dim];
  attention.k_stride_head = k.strides[cache.head_dim];
  attention.v_stride_token = v.strides[cache.token_dim];
  attention.v_stride_head = v.strides[cache.head_dim];
  attention.out_stride_token = of.num_qo_heads * of.head_dim_vo;
  attention.out_stride_head = of.head_dim_vo;
  attention.num_qo_heads = static_cast<int>(of.num_qo_heads);
  attention.head_dim_qk = static_cast<int>(of.head_dim_qk);
  attention.head_dim_vo = static_cast<int>(of.head_dim_vo);
  attention.window_left = window_of(options.window_left);
  attention.causal = options.has(kCausal);
  attention.num_kv_heads = make_divider(static_cast<uint32>(of.num_kv_heads));
  attention.num_splits = make_divider(1);
  attention.group_size = make_divider(static_cast<uint32>(of.group_size()));
  attention.sm_scale = static_cast<float>(options.sm_scale);
  attention.logits_soft_cap = static_cast<float>(options.logits_soft_cap);
  attention.rope_turns = 0.5 * std::numbers::inv_pi / options.rope_scale;
  attention.rope_ratio =
      options.rotates ? std::pow(options.rope_theta, -2.0 / of.head_dim_qk) : 1.0;

  const ListLayout layout = list_layout(of.batch_size(), of.num_tokens, of.group_size(),
                                        of.num_kv_heads, options.has(kInvariant));
  params.list = static_cast<const int*>(list.const_data_ptr());
  params.records_at = layout.records_at;
  params.form = form;
  params.page_size = make_divider(static_cast<uint32>(of.page_size));
  if (is_paged(form)) {
    params.kv_indices = ints(in.kv_indices);
    params.num_indices = cache.outer == 0 ? 0 : static_cast<int>(in.kv_indices->size(0));
    params.num_pages = static_cast<int>(cache.outer);
    const Units keys = units_of(in.k, cache);
    const Units values = units_of(in.v, cache);
    params.k_page_units = keys.page;
    params.k_token_units = keys.token;
    params.k_unit = keys.unit;
    params.v_page_units = values.page;
    params.v_token_units = values.token;
    params.v_unit = values.unit;
  } else if (form == KvForm::kRagged) {
    params.num_indices = static_cast<int>(cache.tokens);
    params.k_origin_stride = attention.k_stride_token;
    params.v_origin_stride = attention.v_stride_token;
  } else {
    params.num_indices = static_cast<int>(cache.outer);
    params.max_kv_len = cache.outer == 0 ? 0 : static_cast<int>(cache.tokens);
    params.k_origin_stride = k.strides[0];
    params.v_origin_stride = v.strides[0];
  }
  params.max_records = static_cast<int>(layout.max_records);
  params.num_ctas = plan.num_ctas;
  params.team_size = make_divider(static_cast<uint32>(plan.team_size));
  params.slot_rows = plan.slot_rows;
  params.num_tokens = static_cast<int>(of.num_tokens);
  params.last_partial_row = static_cast<int>(plan.num_partial_rows) - plan.high;
  return params;
}

Lengths check_inputs(const Inputs& in, const BatchOptions& options, int64_t max_q_len,
                     Cache& cache) {
  const char* op = in.q.op;
  check_cuda(in.q);
  const bool paged = in.kv_indices.has_value();
  const bool ragged = !paged && in.kv_indptr.has_value();
  check_options(op, options);
  check_cache(in.q, in.k, in.v, ragged ? 3 : 4, device(in.q.gpu));
  cache = cache_of(in.k, ragged, options.has(kHnd));
  check_index(op, "kv_indices", in.kv_indices, in.q, -1, "");
  if (paged && (!in.kv_indptr || !in.kv_lens)) {
    fail(op, in.kv_indptr ? "kv_last_page_len" : "kv_indptr", "a tensor, since kv_indices is one",
         "None", "A page table is kv_indptr, kv_indices and kv_last_page_len (or kv_lens)");
  }
  if (ragged && in.kv_lens) {
    fail(op, "kv_lens", "None for ragged keys (kv_indptr without kv_indices)", "a tensor",
         "Pass kv_indices for paged keys, or leave kv_indptr out for padded ones");
  }
  const int64_t last = in.k.rank() - 1;
  const Lengths of = {op,
                      in.qo_indptr,
                      in.kv_indptr,
                      in.kv_lens,
                      options.flags,
                      paged ? cache.tokens : 1,
                      in.q.sizes[0],
                      in.q.sizes[1],
                      cache.num_heads,
                      in.q.sizes[2],
                      in.v.sizes[last],
                      max_q_len,
                      options.window_left};
  check_lengths(of, in.q);
  if (!paged && !ragged) {
    if (cache.outer != of.batch_size()) {
      fail(op, in.k.name, "batch_size " + std::to_string(of.batch_size()) + " rows",
           std::to_string(cache.outer), "Padded keys are [batch_size, max_kv_len, ...]");
    }
  }
  if (cache.tokens > kMaxCount || cache.outer > kMaxCount ||
      (paged && in.kv_indices->size(0) > kMaxCount)) {
    fail(op, in.k.name, "at most 2^30 tokens or pages", shape_text(in.k.tensor), "Split the pool");
  }
  return of;
}

void run(const Inputs& in, const Lengths& of, const BatchOptions& options, const Cache& cache,
         const Tensor& out, float* lse) {
  const char* op = of.op;
  if (of.num_tokens == 0) return;
  const Device& gpu = device(in.q.gpu);
  BatchProblem problem = problem_of(of);
  problem.bf16 = in.q.dtype == Dtype::BFloat16;
  problem.paged = in.kv_indices.has_value();
  problem.rotates = options.rotates;
  problem.fp16_logits = options.fp16_logits;
  const BatchPlan plan = plan_batch(problem, gpu_of(gpu));
  if (plan.num_partial_rows > kMaxCount) {
    fail(op, "batch_invariant", "a batch whose partial results have at most 2^30 rows",
         std::to_string(plan.num_partial_rows), "Split the call");
  }

  std::optional<Tensor> own_list;
  if (in.schedule) {
    const Arg arg{op, "schedule", *in.schedule};
    check_same_device(arg, in.q);
    check_dtype(arg, {Dtype::Int});
    check_rank(arg, {1});
    check_last_stride(arg);
    check_aligned16(arg);
    check_shape(arg, std::array{list_length(of)},
                "the work list of these shapes, heads, mask and page size; make one with "
                "ridgeline.schedule and the arguments of this call");
  } else {
    own_list = empty(in.q.gpu, {list_length(of)}, Dtype::Int);
    launch_schedule(of, problem, plan, gpu, *own_list);
  }
  const Tensor& list = in.schedule ? *in.schedule : *own_list;

  BatchAttentionParams params = make_params(in, of, options, cache, plan, out, lse, list);
  params.tag = tag_of(of, problem, plan);
  const Tensor parts =
      empty(in.q.gpu, {plan.num_partial_rows * (of.head_dim_vo + 2)}, Dtype::Float);
  params.attention.partial_out = static_cast<float*>(parts.mutable_data_ptr());
  params.attention.partial_stats =
      params.attention.partial_out + plan.num_partial_rows * of.head_dim_vo;
  // Why no programmatic launch: CTAs that come while another kernel holds an SM crowd onto the
  // others, and each has an equal share of the work.
  launch(attention_kernel(plan, problem.paged, problem.bf16, batch_variant(problem)), gpu,
         {.grid_x = static_cast<unsigned>(
              std::max<int64_t>(plan.num_ctas, plan.max_tiles * of.num_kv_heads)),
          .block = static_cast<unsigned>(plan.block),
          .dynamic_smem = static_cast<unsigned>(plan.dynamic_smem)},
         &params);

  const ListLayout layout = list_layout(of.batch_size(), of.num_tokens, of.group_size(),
                                        of.num_kv_heads, problem.invariant);
  const BatchCombineParams combine = {
      .partial_out = params.attention.partial_out,
      .partial_stats = params.attention.partial_stats,
      .out = params.attention.out,
      .lse = lse,
      .list = params.list,
      .qo_indptr = problem.max_q_len < of.num_tokens ? ints(of.qo_indptr) : nullptr,
      .out_stride_token = params.attention.out_stride_token,
      .out_stride_head = params.attention.out_stride_head,
      .batch_size = static_cast<int>(problem.batch_size),
      .max_q_len = static_cast<int>(problem.max_q_len),
      .max_cut_tiles = static_cast<int>(layout.max_cut_tiles),
      .num_partial_rows = static_cast<int>(plan.num_partial_rows),
      .num_tokens = params.num_tokens,
      .num_qo_heads = params.attention.num_qo_heads,
      .head_dim_vo = params.attention.head_dim_vo,
      .group_size = params.attention.group_size,
      .team_size = params.team_size,
      .slot_rows = make_divider(static_cast<uint32>(plan.slot_rows)),
      .exponent_scale = exponent_scale(params.attention.sm_scale, params.attention.logits_soft_cap),
      .tag = params.tag};
  launch(combine_kernel(problem.bf16), gpu,
         {.grid_x = static_cast<unsigned>(2 * gpu.num_sms),
          .block = kCombineThreads,
          .pdl = gpu.sm >= 90},
         &combine);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& qo_indptr,
                 const MaybeTensor& kv_indptr, const MaybeTensor& kv_indices,
                 const MaybeTensor& kv_lens, const MaybeTensor& schedule, int64_t flags,
                 int64_t max_q_len, int64_t window_left, double sm_scale) {
  constexpr const char* kOp = "attention";
  const Inputs in = {{kOp, "q", q}, {kOp, "k", k}, {kOp, "v", v}, qo_indptr,
                     kv_indptr,     kv_indices,    kv_lens,       schedule};
  BatchOptions options;
  options.flags = flags;
  options.window_left = window_left;
  options.sm_scale = sm_scale;
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  const Tensor out = empty(in.q.gpu, {of.num_tokens, of.num_qo_heads, of.head_dim_vo}, in.q.dtype);
  run(in, of, options, cache, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> attention_full(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& qo_indptr,
    const MaybeTensor& kv_indptr, const MaybeTensor& kv_indices, const MaybeTensor& kv_lens,
    const MaybeTensor& schedule, int64_t flags, int64_t max_q_len, int64_t window_left,
    double sm_scale, double logits_soft_cap, int64_t pos_encoding_mode, double rope_scale,
    double rope_theta, bool use_fp16_qk_reduction, const MaybeTensor& custom_mask,
    const MaybeTensor& mask_indptr, const MaybeTensor& q_scale, const MaybeTensor& k_scale,
    const MaybeTensor& v_scale, const MaybeTensor& sinks,
    const std::optional<std::vector<Tensor>>& extra_tensors,
    const std::optional<std::vector<double>>& extra_scalars) {
  constexpr const char* kOp = "attention_full";
  for (const auto& [name, given] :
       {std::pair{"custom_mask", custom_mask.has_value()},
        std::pair{"mask_indptr", mask_indptr.has_value()},
        std::pair{"q_scale", q_scale.has_value()}, std::pair{"k_scale", k_scale.has_value()},
        std::pair{"v_scale", v_scale.has_value()}, std::pair{"sinks", sinks.has_value()},
        std::pair{"extra_tensors", extra_tensors.has_value()},
        std::pair{"extra_scalars", extra_scalars.has_value()}}) {
    if (given) not_yet(kOp, name, "a value other than None");
  }
  if (pos_encoding_mode == 2) not_yet(kOp, "pos_encoding_mode", "2 (ALIBI)");
  if (pos_encoding_mode != 0 && pos_encoding_mode != 1) {
    fail(kOp, "pos_encoding_mode", "0 (NONE) or 1 (ROPE_LLAMA)", std::to_string(pos_encoding_mode),
         "Pass one of these");
  }
  if (use_fp16_qk_reduction && q.scalar_type() != Dtype::Half) {
    fail(kOp, "use_fp16_qk_reduction", "False unless q is float16", "True with bfloat16",
         "Leave it out, or convert q, k and v to float16");
  }
  const Inputs in = {{kOp, "q", q}, {kOp, "k", k}, {kOp, "v", v}, qo_indptr,
                     kv_indptr,     kv_indices,    kv_lens,       schedule};
  const BatchOptions options = {
      flags,      window_left, logits_soft_cap,      sm_scale, pos_encoding_mode == 1,
      rope_scale, rope_theta,  use_fp16_qk_reduction};
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  const Tensor out = empty(in.q.gpu, {of.num_tokens, of.num_qo_heads, of.head_dim_vo}, in.q.dtype);
  const Tensor lse = empty(in.q.gpu, {of.num_tokens, of.num_qo_heads}, Dtype::Float);
  run(in, of, options, cache, out, static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? qo_indptr, Tensor? kv_indptr, "
      "Tensor? kv_indices, Tensor? kv_lens, Tensor? schedule, int flags, SymInt max_q_len, "
      "SymInt window_left, float sm_scale) -> Tensor");
  m.def(
      "attention_full(Tensor q, Tensor k, Tensor v, Tensor? qo_indptr, Tensor? kv_indptr, "
      "Tensor? kv_indices, Tensor? kv_lens, Tensor? schedule, int flags, SymInt max_q_len, "
      "SymInt window_left, float sm_scale, float logits_soft_cap, int pos_encoding_mode, "
      "float rope_scale, float rope_theta, bool use_fp16_qk_reduction, Tensor? custom_mask=None, "
      "Tensor? mask_indptr=None, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, Tensor[]? extra_tensors=None, float[]? extra_scalars=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_schedule(Tensor? qo_indptr, Tensor? kv_indptr, Tensor? kv_lens, int flags, "
      "SymInt page_size, SymInt num_qo_tokens, SymInt num_qo_heads, SymInt num_kv_heads, "
      "SymInt head_dim_qk, SymInt head_dim_vo, SymInt max_q_len, SymInt window_left) -> Tensor");
}

static void kernels(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_full", TORCH_BOX(&attention_full));
  m.impl("attention_schedule", TORCH_BOX(&attention_schedule));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
