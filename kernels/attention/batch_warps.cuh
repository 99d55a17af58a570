// Requests of few keys beside tall tiles, a warp each: a warp has all keys of its request's tile of
// 16 rows, in a pipeline of its own, and stores final rows from its own sums. No warp waits for
// another, and while one waits for memory three others go on. The steps are those of tile.cuh.
#pragma once

#include "attention/assignment.cuh"
#include "attention/pipeline_step.cuh"

namespace ridgeline {

// As load_query(), by one warp: lane i finds the place of row i.
template <typename Traits>
__device__ __forceinline__ void load_query_of_warp(const AttentionParams& params,
                                                   const WorkItem& work, int num_rows,
                                                   uint32 tile) {
  using T = typename Traits::T;
  using Copies = RowCopies<Traits::kTileQ, Traits::kQk, 32, false, T, QueryRows<T>>;
  const int lane = threadIdx.x % 32;
  const RowTarget target = row_target(params, work, min(lane, num_rows - 1));
  const int64 offset = target.token * params.q_stride_token + target.head * params.q_stride_head;
  const QueryRows<T> rows = {static_cast<const T*>(params.q) + Copies::lane_element(lane), offset};
  Copies(rows, tile, lane, params.head_dim_qk, num_rows).copy_all();
}

// Runs the records of a range in which every warp has each kNumPipelines-th.
template <typename Traits>
__device__ __forceinline__ void attend_by_warps(const BatchAttentionParams& batch,
                                                const Assignment& assignment, unsigned char* smem) {
  using Kv = typename Traits::Kv;
  using Variant = typename Traits::Variant;
  constexpr int kStages = Traits::kStages;
  constexpr int kPending = 2 * (kStages - 1);  // groups younger than the one a step waits for
  static_assert(Traits::kSplitsKeys && Traits::kQueryInRegisters && !Variant::kTransformsKey &&
                    !Variant::kTransformsQuery,
                "tiles of 16 rows whose warps have pipelines");
  __shared__ BatchItem items[Traits::kNumPipelines];

  const AttentionParams& params = batch.attention;
  // Why so: the compiler then knows that a warp's threads stay together.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = opaque(int(threadIdx.x)) % 32;
  unsigned char* query_tile = smem + warp * (Traits::kQueryBytes + Traits::kPipelineBytes);
  const uint32 query_address = shared_address(query_tile);
  const uint32 key_address = query_address + Traits::kQueryBytes;
  const uint32 value_address = key_address + kStages * Traits::kKeyBytes;
  const float scale = Variant::exponent_scale(params);
  BatchItem& item = items[warp];
  const WorkItem& work = item.work;

#pragma unroll 1
  for (int index = assignment.index + warp; index < assignment.end;
       index += Traits::kNumPipelines) {
    __syncwarp();
    if (lane == 0) {
      item = checked_item<typename Traits::Element>(
          batch, read_record(batch.list + batch.records_at + index * int64(kRecordWords)),
          assignment.lane);
      const int last_row = tile_rows<Traits>(params, item.request, work) - 1;
      item.seen_by_all = {row_keys<Traits>(params, item.request, work, last_row).begin,
                          row_keys<Traits>(params, item.request, work, 0).end};
    }
    __syncwarp();
    const int num_rows = tile_rows<Traits>(params, item.request, work);
    const int num_steps = (work.kv_end - work.kv_begin + Traits::kKeys - 1) / Traits::kKeys;
    const auto first_key = [&](int step) { return work.kv_begin + step * Traits::kKeys; };
    const auto look_up = [&](int step) -> uint32 {
      if (step >= num_steps) return 0;
      return Kv(batch, item).template look_up<Traits::kKeys, 32>(first_key(step), work.kv_end);
    };
    const auto start_keys = [&](int step, uint32 answer, int stage) {
      if (step < num_steps) {
        start_keys_of<Traits>(batch, item, first_key(step), answer,
                              key_address + stage * Traits::kKeyBytes, lane);
      }
      cp_async_commit();
    };
    const auto start_values = [&](int step, uint32 answer, int stage) {
      if (step < num_steps) {
        start_values_of<Traits>(batch, item, first_key(step), answer,
                                value_address + stage * Traits::kValueBytes, lane);
      }
      cp_async_commit();
    };

    uint32 answers[kStages + 1];
#pragma unroll
    for (int step = 0; step <= kStages; ++step) answers[step] = look_up(step);
    load_query_of_warp<Traits>(params, work, num_rows, query_address);
    cp_async_commit();
    start_keys(0, answers[0], 0);
#pragma unroll
    for (int stage = 1; stage < kStages; ++stage) {
      start_values(stage - 1, answers[stage - 1], stage - 1);
      start_keys(stage, answers[stage], stage);
    }
    uint32 answer = answers[kStages - 1];
    uint32 next_answer = answers[kStages];
    cp_async_wait<kPending + 1>();
    __syncwarp();
    const QueryFragments<Traits> query(query_address,
                                       down_first_lane_offset<Traits::kQueryRowBytes>(lane));
    RowState<Traits> state;
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      const int previous_stage = stage == 0 ? kStages - 1 : stage - 1;
      const int step_key = first_key(step);
      cp_async_wait<kPending>();
      __syncwarp();
      start_values(step + kStages - 1, answer, previous_stage);
      answer = next_answer;
      next_answer = look_up(step + kStages + 1);
      attend_step<Traits>(params, item, query, state, step_key, key_address, value_address, stage,
                          lane, scale, [&] {
                            cp_async_wait<kPending>();
                            __syncwarp();
                            start_keys(step + kStages, answer, stage);
                          });
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncwarp();
    store_final<Traits>(params, work, state, scale, query_tile, 0, 0, num_rows);
  }
}

}  // namespace ridgeline
