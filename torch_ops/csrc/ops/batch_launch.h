// Launches of batched attention: the schedule, and the tiles with what adds up their parts.
#pragma once

#include <initializer_list>

#include "ops/batch_choice.h"
#include "ops/batch_inputs.h"
#include "runtime/kernel.h"

namespace ridgeline {

// Where results go.
struct BatchResults {
  void* out;
  int64_t out_stride_token, out_stride_head;  // elements
  float* lse;                                 // contiguous; null: not wanted
};

// Launches what fills a work list of list_length(of) words.
void launch_schedule(const Lengths& of, const Device& gpu, const Tensor& list);

// Runs attention, with the list of `in` or one of its own.
void launch_attention(const Inputs& in, const Lengths& of, const BatchOptions& options,
                      const Cache& cache, const BatchResults& results);

// The launches of a call that has a list. Those of another call differ in the addresses of q, k, v,
// out and lse alone, where all else is as it was.
struct BatchCall {
  const Device* gpu;
  Kernel* attention;
  Kernel* combine;  // null where nothing is left to add up
  Launch how;       // of attention
  int64_t num_partial_rows;
  int num_counters;
  BatchAttentionParams params;
};
BatchCall prepare_attention(const Inputs& in, const Lengths& of, const BatchOptions& options,
                            const Cache& cache, const BatchResults& results);
// Fills in what the stream has for the call's parts.
void launch_attention(BatchCall& call);

// The steps of both, for launches of more than one batch.
BatchProblem problem_of(const Lengths& of);
BatchProblem problem_of(const Inputs& in, const Lengths& of, const BatchOptions& options);
BatchGpu gpu_of(const Device& gpu);
int tag_of(std::initializer_list<int64_t> given);
ScheduleSegment schedule_segment(const Lengths& of, const BatchProblem& problem, int dims, int low,
                                 int high, int sm, bool wide);
BatchAttentionParams make_params(const Inputs& in, const Lengths& of, const BatchOptions& options,
                                 const Cache& cache, const BatchProblem& problem,
                                 const BatchPlan& plan, const Device& gpu, const ListLayout& layout,
                                 const BatchResults& results, const int* list);

// What a list's maker is told of all its segments; these are still to be filled in.
template <int kSegments>
ScheduleParams<kSegments> schedule_params(const Lengths& of, const BatchPlan& plan,
                                          const ListLayout& layout, int64_t batch_size, int* list,
                                          int tag) {
  const int num_teams = plan.num_ctas / plan.team_size;
  const int64_t num_bundles = of.num_kv_heads / plan.team_size;
  return {.segments = {},
          .list = list,
          .records_at = layout.records_at,
          .requests_at = layout.requests_at,
          .items_at = layout.items_at,
          .costs_at = layout.costs_at,
          .item_starts_at = layout.item_starts_at,
          .max_items = static_cast<int>(layout.max_items),
          .batch_size = static_cast<int>(batch_size),
          .num_teams = num_teams,
          .team_count = make_divider(static_cast<uint32>(num_teams)),
          .team_size = plan.team_size,
          .num_bundles = make_divider(static_cast<uint32>(num_bundles)),
          .max_tiles = plan.max_tiles,
          .max_split = kSegments == 1 ? plan.max_split : 0,
          .may_sort_finely = 0,
          .num_sms = make_divider(static_cast<uint32>(plan.num_sms)),
          .max_ranges = plan.max_ranges,
          .few_tiles = plan.few_tiles,
          .group_size = make_divider(static_cast<uint32>(of.group_size())),
          .invariant = (of.flags & kInvariant) != 0,
          .slot_rows = plan.slot_rows,
          .tag = tag};
}

// CTAs of attention: of all ranges that a list may have, or all tiles.
unsigned batch_grid(const BatchPlan& plan, int64_t num_kv_heads);

// CTAs of the scheduler.
unsigned schedule_ctas(const ListLayout& layout, const Lengths& of, const BatchPlan& plan);

}  // namespace ridgeline
