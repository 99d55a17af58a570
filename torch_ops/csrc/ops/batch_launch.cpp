#include "ops/batch_launch.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <string>

#include "ops/batch_choice.h"
#include "ops/list_report.h"
#include "runtime/alloc.h"
#include "runtime/kernel.h"
#include "runtime/workspace.h"

namespace ridgeline {
namespace {

const int* ints(const MaybeTensor& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

int window_of(int64_t window_left) {
  return window_left >= kMaxBatchCount ? -1 : static_cast<int>(window_left);
}

// Of everything that a list depends on beside the contents of the index tensors.
int batch_tag(const Lengths& of, const BatchProblem& problem, const BatchPlan& plan) {
  return tag_of({plan.dims, plan.kernel, plan.num_ctas, plan.slot_rows, of.batch_size,
                 of.num_tokens, of.num_qo_heads, of.num_kv_heads, problem.max_q_len,
                 of.flags & ~kHnd, of.window_left, int64_t(of.form),
                 is_paged(of.form) ? of.page_size : 1});
}

}  // namespace

int tag_of(std::initializer_list<int64_t> given) {
  uint64_t hash = 14695981039346656037ull;
  for (const int64_t value : given) {
    hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211ull;
  }
  return static_cast<int>(static_cast<uint32_t>(hash ^ (hash >> 32)) | 1u);
}

BatchProblem problem_of(const Lengths& of) {
  BatchProblem problem;
  problem.head_dim_qk = static_cast<int>(of.head_dim_qk);
  problem.head_dim_vo = static_cast<int>(of.head_dim_vo);
  problem.batch_size = of.batch_size;
  problem.num_tokens = of.num_tokens;
  const int64_t most = of.qo_indptr || of.form == KvForm::kSingle ? of.num_tokens : 1;
  problem.max_q_len = of.max_q_len < 0 ? most : std::min(of.max_q_len, most);
  problem.num_qo_heads = of.num_qo_heads;
  problem.num_kv_heads = of.num_kv_heads;
  problem.paged = is_paged(of.form);
  problem.invariant = (of.flags & kInvariant) != 0;
  return problem;
}

BatchProblem problem_of(const Inputs& in, const Lengths& of, const BatchOptions& options) {
  BatchProblem problem = problem_of(of);
  problem.bf16 = in.q.dtype == Dtype::BFloat16;
  problem.rotates = options.logits.rotates;
  problem.fp16_logits = options.logits.fp16_logits;
  problem.caps = caps_products(static_cast<float>(options.logits.sm_scale),
                               static_cast<float>(options.logits.logits_soft_cap));
  problem.max_keys = in.kv_indices ? in.kv_indices->size(0) * of.page_size
                                   : in.k.numel() / (of.num_kv_heads * of.head_dim_qk);
  return problem;
}

BatchGpu gpu_of(const Device& gpu) {
  return {gpu.sm, gpu.num_sms, gpu.max_dynamic_smem + 1024};
}

ScheduleSegment schedule_segment(const Lengths& of, const BatchProblem& problem, int dims, int low,
                                 int high, int sm, bool wide) {
  return {.qo_indptr = ints(of.qo_indptr),
          .kv_indptr = ints(of.kv_indptr),
          .kv_lens = ints(of.kv_lens),
          .batch_size = static_cast<int>(problem.batch_size),
          .num_tokens = static_cast<int>(problem.num_tokens),
          .max_q_len = static_cast<int>(problem.max_q_len),
          .form = of.form,
          .page_size = static_cast<int>(of.page_size),
          .single_kv_len = static_cast<int>(of.single_kv_len),
          .causal = (of.flags & kCausal) != 0,
          .window_left = window_of(of.window_left),
          .num_heights = low == high ? 1 : 2,
          .heights = {tile_height(dims, low, sm, wide), tile_height(dims, high, sm, wide)}};
}

unsigned schedule_ctas(const ListLayout& layout, const Lengths& of, const BatchPlan& plan) {
  if (layout.max_records > kMaxBatchCount) {
    fail(of.op, "q", "fewer than 2^30 tiles of work", std::to_string(layout.max_records),
         "Split the call");
  }
  const int64_t units = layout.max_items * (of.num_kv_heads / plan.team_size);
  const int64_t most = units + plan.num_ctas / plan.team_size;
  return static_cast<unsigned>(
      std::min<int64_t>(most / schedule_threads(plan.high > 16) + 1, kMaxScheduleCtas));
}

namespace {

// Of a token's key and value, all heads of them.
double bytes_of_key(const Lengths& of) {
  return 2.0 * static_cast<double>(of.num_kv_heads) *
         static_cast<double>(of.head_dim_qk + of.head_dim_vo);
}

void launch_schedule(const Lengths& of, const BatchProblem& problem, const BatchPlan& plan,
                     const Device& gpu, int* list, int tag) {
  static Kernel& of_low = kernel(schedule_name(false));
  static Kernel& of_tall = kernel(schedule_name(true));
  const ListLayout layout = list_layout(problem.batch_size, problem.num_tokens, of.group_size(),
                                        problem.num_kv_heads, problem.invariant);
  ScheduleParams<1> params = schedule_params<1>(of, plan, layout, problem.batch_size, list, tag);
  params.segments[0] =
      schedule_segment(of, problem, plan.dims, plan.low, plan.high, gpu.sm, plan.wide);
  // As far as is known of them without the lengths: as many keys as queries.
  params.may_sort_finely =
      static_cast<double>(problem.num_tokens) * bytes_of_key(of) <= gpu.l2_bytes;
  const bool tall = plan.high > 16;
  launch(tall ? of_tall : of_low, gpu,
         {.grid_x = schedule_ctas(layout, of, plan),
          .block = static_cast<unsigned>(schedule_threads(tall))},
         &params);
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

// Whether keys need not stay in the L2 cache: there are more than it holds, and no more numbers in
// the page table than pages, as there are where many requests share theirs.
bool are_keys_read_once(const Lengths& of, const BatchProblem& problem, const Cache& cache,
                        const Device& gpu) {
  return static_cast<double>(problem.max_keys) * bytes_of_key(of) > gpu.l2_bytes &&
         problem.max_keys <= cache.outer * cache.tokens;
}

// Teams that the work would go to if all requests had the same length, as far as the table tells.
int64 sharing_teams(const Lengths& of, const BatchProblem& problem, const BatchPlan& plan,
                    const Device& gpu) {
  const int num_teams = plan.max_ranges;
  if (plan.high > 16 || problem.invariant || problem.batch_size == 0) return num_teams;
  const int64 num_bundles = of.num_kv_heads / plan.team_size;
  const int64 num_units = problem.batch_size * num_bundles;
  const TileHeight height = tile_height(plan.dims, plan.low, gpu.sm, plan.wide);
  const int64 keys = std::min(problem.max_keys / problem.batch_size, int64{kWholeKeys} + 1);
  const int kv_tile = static_cast<int>(height.kv_tile.divisor);
  const int64 cost = cost_of(height, (static_cast<int>(keys) + kv_tile - 1) / kv_tile);
  return stays_whole(height, cost * num_bundles, cost * num_units, num_units, num_teams,
                     num_bundles)
             ? num_units
             : num_teams;
}

}  // namespace

BatchAttentionParams make_params(const Inputs& in, const Lengths& of, const BatchOptions& options,
                                 const Cache& cache, const BatchProblem& problem,
                                 const BatchPlan& plan, const Device& gpu, const ListLayout& layout,
                                 const BatchResults& results, const int* list) {
  const Arg &q = in.q, &k = in.k, &v = in.v;
  const KvForm form = of.form;
  BatchAttentionParams params = {};
  AttentionParams& attention = params.attention;
  attention.q = q.data;
  attention.k = k.data;
  attention.v = v.data;
  attention.out = results.out;
  attention.lse = results.lse;
  attention.q_stride_token = q.strides[0];
  attention.q_stride_head = q.strides[1];
  attention.k_stride_token = k.strides[cache.token_dim];
  attention.k_stride_head = k.strides[cache.head_dim];
  attention.v_stride_token = v.strides[cache.token_dim];
  attention.v_stride_head = v.strides[cache.head_dim];
  attention.out_stride_token = results.out_stride_token;
  attention.out_stride_head = results.out_stride_head;
  attention.num_qo_heads = static_cast<int>(of.num_qo_heads);
  attention.head_dim_qk = static_cast<int>(of.head_dim_qk);
  attention.head_dim_vo = static_cast<int>(of.head_dim_vo);
  attention.window_left = window_of(options.window_left);
  attention.causal = options.has(kCausal);
  attention.num_kv_heads = make_divider(static_cast<uint32>(of.num_kv_heads));
  attention.num_splits = make_divider(1);
  attention.group_size = make_divider(static_cast<uint32>(of.group_size()));
  attention.sm_scale = static_cast<float>(options.logits.sm_scale);
  attention.logits_soft_cap = static_cast<float>(options.logits.logits_soft_cap);
  attention.rope_turns = rope_turns(options.logits);
  attention.rope_ratio = rope_ratio(options.logits, of.head_dim_qk);

  params.list = list;
  params.records_at = layout.records_at;
  params.form = form;
  params.page_size = make_divider(static_cast<uint32>(of.page_size));
  if (is_paged(form)) {
    params.kv_indices = ints(in.kv_indices);
    params.num_indices = cache.outer == 0 ? 0 : static_cast<int>(in.kv_indices->size(0));
    params.num_pages = static_cast<int>(cache.outer);
    params.entries_of_team = static_cast<float>(params.num_indices) /
                             static_cast<float>(sharing_teams(of, problem, plan, gpu));
    const Units keys = units_of(in.k, cache);
    const Units values = units_of(in.v, cache);
    params.k_page_units = keys.page;
    params.k_token_units = keys.token;
    params.k_unit = keys.unit;
    params.v_page_units = values.page;
    params.v_token_units = values.token;
    params.v_unit = values.unit;
  } else if (form == KvForm::kRagged || form == KvForm::kSingle) {
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
  params.num_ctas = plan.max_ranges * plan.team_size;
  params.num_at_once = plan.num_ctas;
  params.team_size = make_divider(static_cast<uint32>(plan.team_size));
  params.slot_rows = make_divider(static_cast<uint32>(plan.slot_rows));
  params.max_cut_tiles = static_cast<int>(layout.max_cut_tiles);
  params.num_tokens = static_cast<int>(of.num_tokens);
  params.last_partial_row = static_cast<int>(plan.num_partial_rows) - plan.high;
  params.last_slot_row = static_cast<int>(plan.num_partial_rows) - plan.slot_rows;
  params.batch_size = static_cast<int>(of.batch_size);
  params.max_q_len = static_cast<int>(problem.max_q_len);
  params.qo_indptr = ints(of.qo_indptr);
  params.keys_are_read_once = are_keys_read_once(of, problem, cache, gpu);
  return params;
}

unsigned batch_grid(const BatchPlan& plan, int64_t num_kv_heads) {
  const int64_t tiles = plan.max_tiles * num_kv_heads + plan.max_split * (plan.high / plan.low - 1);
  return static_cast<unsigned>(std::max<int64_t>(plan.max_ranges * plan.team_size, tiles));
}

void launch_schedule(const Lengths& of, const Device& gpu, const Tensor& list) {
  const BatchProblem problem = problem_of(of);
  const BatchPlan plan = plan_batch(problem, gpu_of(gpu));
  launch_schedule(of, problem, plan, gpu, static_cast<int*>(list.mutable_data_ptr()),
                  batch_tag(of, problem, plan));
}

namespace {

// What a call's shapes, options and GPU settle.
struct Settled {
  const Device& gpu;
  const BatchProblem problem;
  const BatchPlan plan;
  const int tag;

  Settled(const Inputs& in, const Lengths& of, const BatchOptions& options)
      : gpu(device(in.q.gpu)),
        problem(problem_of(in, of, options)),
        plan(plan_batch(problem, gpu_of(gpu))),
        tag(batch_tag(of, problem, plan)) {
    if (plan.num_partial_rows <= kMaxBatchCount) return;
    fail(of.op, "batch_invariant", "a batch whose partial results have at most 2^30 rows",
         std::to_string(plan.num_partial_rows), "Split the call");
  }
};

const int* list_of(const Inputs& in, const Lengths& of) {
  const Arg given{of.op, "schedule", *in.schedule};
  check_list(given, list_length(of), in.q);
  return static_cast<const int*>(given.data);
}

BatchCall call_of(const Inputs& in, const Lengths& of, const BatchOptions& options,
                  const Cache& cache, const Settled& settled, const BatchResults& results,
                  const int* list) {
  const auto& [gpu, problem, plan, tag] = settled;
  const ListLayout layout = list_layout(of.batch_size, of.num_tokens, of.group_size(),
                                        of.num_kv_heads, problem.invariant);
  const bool complete = options.complete_tag == tag;
  const int variant = batch_variant(problem, plan, gpu.sm);
  BatchCall call = {
      .gpu = &gpu,
      .attention = &attention_kernel(plan, problem.paged, problem.bf16, variant),
      .combine = complete ? nullptr : &combine_kernel(problem.bf16),
      .how = {.grid_x = batch_grid(plan, of.num_kv_heads),
              .block = static_cast<unsigned>(plan.block),
              .dynamic_smem = static_cast<unsigned>(plan.dynamic_smem)},
      .num_partial_rows = plan.num_partial_rows,
      .num_counters = plan.in_one_launch ? num_batch_counters(plan.num_ctas) : 0,
      .params = make_params(in, of, options, cache, problem, plan, gpu, layout, results, list)};
  call.params.tag = tag;
  if (options.report != 0 && !complete) {
    call.params.report = reinterpret_cast<int64*>(report_place(options.report));
    call.params.report_value =
        static_cast<int64>(uint64_t{static_cast<uint32_t>(tag)} << 32 | options.report);
  }
  return call;
}

}  // namespace

void launch_attention(const Inputs& in, const Lengths& of, const BatchOptions& options,
                      const Cache& cache, const BatchResults& results) {
  if (of.num_tokens == 0) return;
  const Settled settled(in, of, options);
  if (in.schedule) {
    BatchCall call = call_of(in, of, options, cache, settled, results, list_of(in, of));
    launch_attention(call);
    return;
  }
  const Tensor own = empty(in.q.gpu, {list_length(of)}, Dtype::Int);
  auto* list = static_cast<int*>(own.mutable_data_ptr());
  launch_schedule(of, settled.problem, settled.plan, settled.gpu, list, settled.tag);
  BatchCall call = call_of(in, of, options, cache, settled, results, list);
  launch_attention(call);
}

BatchCall prepare_attention(const Inputs& in, const Lengths& of, const BatchOptions& options,
                            const Cache& cache, const BatchResults& results) {
  return call_of(in, of, options, cache, Settled(in, of, options), results, list_of(in, of));
}

void launch_attention(BatchCall& call) {
  const Device& gpu = *call.gpu;
  AttentionParams& attention = call.params.attention;
  const int64_t num_rows = call.num_partial_rows;
  const int64_t row = attention.head_dim_vo;
  const Workspace parts(gpu, num_rows * (row + 2) * int64_t{sizeof(float)}, call.num_counters);
  attention.partial_out = static_cast<float*>(parts.data());
  attention.partial_stats = attention.partial_out + num_rows * row;
  attention.counters = parts.counters();
  // Why no programmatic launch: CTAs that come while another kernel holds an SM crowd onto the
  // others, and each has an equal share of the work.
  launch(*call.attention, gpu, call.how, &call.params);
  if (attention.counters || !call.combine) return;
  launch(*call.combine, gpu,
         {.grid_x = static_cast<unsigned>(2 * gpu.num_sms),
          .block = kCombineThreads,
          .pdl = gpu.sm >= 90},
         &call.params);
}

}  // namespace ridgeline
