// Tiles of 16 rows of a batch, whose warps split the keys, as one stream of steps: loads run as far
// ahead at a record's end as within it, into the next record's keys, so that memory stays busy
// while the warps' sums are merged and stored. The steps are those of tile.cuh.
#pragma once

#include "attention/addressing.cuh"
#include "attention/assignment.cuh"
#include "attention/pipeline_step.cuh"

namespace ridgeline {

// A step of an item, of the calling warp.
struct StreamPlace {
  int item;  // which of two
  int first_key;
  int steps_left;  // of the item; where there are none, nothing is loaded
};

template <typename Traits>
__device__ __forceinline__ int num_steps(const WorkItem& work) {
  return (work.kv_end - work.kv_begin + Traits::kKvTile - 1) / Traits::kKvTile;
}

template <typename Traits>
__device__ __forceinline__ StreamPlace begin_of(const BatchItem (&items)[2], int item) {
  const WorkItem& work = items[item].work;
  return {item, work.kv_begin + int(threadIdx.x / 32) * Traits::kKeys, num_steps<Traits>(work)};
}

// To the next step; from the current item's last one to the other item's first, if that joins. True
// where it went there.
template <typename Traits>
__device__ __forceinline__ bool advance(StreamPlace& place, const BatchItem (&items)[2],
                                        int current, bool joins) {
  place.first_key += Traits::kKvTile;
  const bool moves_on = --place.steps_left == 0 && joins && place.item == current;
  if (moves_on) place = begin_of<Traits>(items, 1 - place.item);
  return moves_on;
}

// Prepares the record after items[current], if there is one that its stream may go on with: both
// are long enough that loads run into no third one. One thread.
template <typename Traits>
__device__ __forceinline__ bool joins_next(const BatchAttentionParams& params,
                                           BatchItem (&items)[2], int current,
                                           Assignment& assignment, OwnCuts* cuts) {
  constexpr int kLeast = Traits::kStages;
  const BatchItem& item = items[current];
  if (!Traits::kJoins || assignment.index + 1 >= assignment.end) return false;
  const WorkRecord record = assignment.next;
  if (num_steps<Traits>(item.work) < kLeast) return false;
  BatchItem& next = items[1 - current];
  next = checked_item<typename Traits::Element>(params, record, assignment.lane);
  if (num_steps<Traits>(next.work) < kLeast) return false;
  if (cuts != nullptr) keep_cut(params, record, 1, *cuts);
  fetch_record(params, assignment, 2);
  return true;
}

// Runs the record in items[0] and those that its stream goes on with. The last of them is
// assignment.index then, and the record after it in assignment.next.
template <typename Traits>
__device__ __forceinline__ void attend_stream(const BatchAttentionParams& batch,
                                              BatchItem (&items)[2], Assignment& assignment,
                                              OwnCuts* cuts, unsigned char* smem) {
  using Kv = typename Traits::Kv;
  using Variant = typename Traits::Variant;
  constexpr int kStages = Traits::kStages;
  constexpr int kPending = 2 * (kStages - 1);  // groups younger than the one a step waits for
  __shared__ bool joins;

  const AttentionParams& params = batch.attention;
  const int warp = threadIdx.x / 32;
  const int loader = opaque(int(threadIdx.x)) % 32;
  unsigned char* key_tiles = smem + Traits::kQueryBytes + warp * Traits::kPipelineBytes;
  const uint32 query_address = shared_address(smem);
  const uint32 key_address = shared_address(key_tiles);
  const uint32 value_address = key_address + kStages * Traits::kKeyBytes;

  const auto look_up = [&](const StreamPlace& place) -> uint32 {
    if (place.steps_left <= 0) return 0;
    return Kv(batch, items[place.item])
        .template look_up<Traits::kKeys, Traits::kLoaders>(place.first_key,
                                                           items[place.item].work.kv_end);
  };
  const auto start_query = [&](const BatchItem& item) {
    load_query<Traits>(params, item.work, tile_rows<Traits>(params, item.request, item.work),
                       query_address);
  };
  const auto start_keys = [&](const StreamPlace& place, uint32 answer, int stage) {
    if (place.steps_left > 0) {
      start_keys_of<Traits>(batch, items[place.item], place.first_key, answer,
                            key_address + stage * Traits::kKeyBytes, loader);
    }
    cp_async_commit();
  };
  const auto start_values = [&](const StreamPlace& place, uint32 answer, int stage) {
    if (place.steps_left > 0) {
      start_values_of<Traits>(batch, items[place.item], place.first_key, answer,
                              value_address + stage * Traits::kValueBytes, loader);
    }
    cp_async_commit();
  };

  // Where loads have come to, and what addresses need from memory a step further.
  StreamPlace loads = begin_of<Traits>(items, 0);
  StreamPlace ahead = loads;
  uint32 answers[kStages + 1];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) {
    if (i > 0) advance<Traits>(ahead, items, 0, false);
    answers[i] = look_up(ahead);
  }
  start_query(items[0]);
  if (threadIdx.x == 0) fetch_record(batch, assignment, 1);
  cp_async_commit();
  start_keys(loads, answers[0], 0);
#pragma unroll
  for (int stage = 1; stage < kStages; ++stage) {
    start_values(loads, answers[stage - 1], stage - 1);
    advance<Traits>(loads, items, 0, false);
    start_keys(loads, answers[stage], stage);
  }
  uint32 answer = answers[kStages - 1];
  uint32 next_answer = answers[kStages];

  // Why already: what adds up the parts finds out where they are meanwhile.
  pdl_launch_dependents();
  if constexpr (Variant::kTransformsKey) {
    Variant::prepare(params, smem + Traits::kScratchOffset, threadIdx.x, Traits::kNumThreads);
  }
  cp_async_wait<kPending + 1>();
  const float scale = Variant::exponent_scale(params);
  int current = 0;
  int stage = 0;
#pragma unroll 1
  for (;;) {
    const BatchItem& item = items[current];
    __syncthreads();
    if constexpr (Variant::kTransformsQuery) {
      const int num_rows = tile_rows<Traits>(params, item.request, item.work);
      Variant::template query<typename Traits::T, Traits::kQk>(
          params, item.request, smem + Traits::kScratchOffset, smem, num_rows, threadIdx.x,
          Traits::kNumThreads,
          [&](int row) { return int(params.group_size.quotient(item.work.q_row_begin + row)); });
      __syncthreads();
    }
    // Before the fragments, which take its registers.
    if (threadIdx.x == 0) {
      const int last_row = tile_rows<Traits>(params, item.request, item.work) - 1;
      // Steps within this range are seen whole by every row.
      items[current].seen_by_all = {
          row_keys<Traits>(params, item.request, item.work, last_row).begin,
          row_keys<Traits>(params, item.request, item.work, 0).end};
      joins = joins_next<Traits>(batch, items, current, assignment, cuts);
    }
    const QueryFragments<Traits> query(query_address,
                                       down_first_lane_offset<Traits::kQueryRowBytes>(loader));
    RowState<Traits> state;
    __syncthreads();
    const bool goes_on = joins;
    if (goes_on && ahead.steps_left == 0) {
      // An item of as few steps as there are stages: what comes after it was not known before.
      ahead = begin_of<Traits>(items, 1 - current);
      next_answer = look_up(ahead);
    }

    int step_key = item.work.kv_begin + warp * Traits::kKeys;
#pragma unroll 1
    for (int steps = num_steps<Traits>(item.work); steps > 0; --steps) {
      const int previous_stage = stage == 0 ? kStages - 1 : stage - 1;
      cp_async_wait<kPending>();
      __syncwarp();
      start_values(loads, answer, previous_stage);
      const bool starts_next = advance<Traits>(loads, items, current, goes_on);
      answer = next_answer;
      advance<Traits>(ahead, items, current, goes_on);
      next_answer = look_up(ahead);
      if constexpr (Variant::kTransformsKey) {
        Variant::template key<typename Traits::Element, Traits::kQk>(
            params, shared_pointer(query_address + Traits::kScratchOffset),
            shared_pointer(key_address + stage * Traits::kKeyBytes), Traits::kKeys, loader,
            Traits::kLoaders, step_key);
        __syncwarp();
      }
      attend_step<Traits>(params, item, query, state, step_key, key_address, value_address, stage,
                          loader, scale, [&] {
                            cp_async_wait<kPending>();
                            __syncwarp();
                            // The query tile's fragments are in registers.
                            if (starts_next) start_query(items[1 - current]);
                            start_keys(loads, answer, stage);
                          });
      stage = stage == kStages - 1 ? 0 : stage + 1;
      step_key += Traits::kKvTile;
    }

    // The last step's values are not needed any more, and their stage is the next to be loaded.
    const int last_stage = opaque(stage == 0 ? kStages - 1 : stage - 1);
    __syncwarp();
    merge_and_store<Traits>(params, item.work, state, scale,
                            shared_pointer(query_address) + Traits::kQueryBytes +
                                kStages * Traits::kKeyBytes + last_stage * Traits::kValueBytes,
                            tile_rows<Traits>(params, item.request, item.work));
    if (!goes_on) return;
    current = 1 - current;
    if (threadIdx.x == 0) ++assignment.index;
    cp_async_wait<kPending>();
  }
}

}  // namespace ridgeline
