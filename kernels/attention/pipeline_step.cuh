// What warps that each have keys and a pipeline of their own do: tiles of 16 rows, one batch item.
#pragma once

#include "attention/batch_params.h"
#include "attention/tile.cuh"

namespace ridgeline {

// Starts the copies of a step's keys from `first_key` on, whose places in memory `answer` tells.
template <typename Traits>
__device__ __forceinline__ void start_keys_of(const BatchAttentionParams& batch,
                                              const BatchItem& item, int first_key, uint32 answer,
                                              uint32 tile, int lane) {
  typename Traits::Kv kv(batch, item);
  kv.turn_to(answer);
  key_copies<Traits>(batch.attention, kv, tile, lane, first_key, item.work.kv_end)
      .template copy_all<true>(batch.keys_are_read_once);
}

template <typename Traits>
__device__ __forceinline__ void start_values_of(const BatchAttentionParams& batch,
                                                const BatchItem& item, int first_key, uint32 answer,
                                                uint32 tile, int lane) {
  typename Traits::Kv kv(batch, item);
  kv.turn_to(answer);
  value_copies<Traits>(batch.attention, kv, tile, lane, first_key, item.work.kv_end)
      .template copy_all<true>(batch.keys_are_read_once);
}

// One step of such a warp, with keys and values in a stage of the tiles at these addresses.
// `between()` waits for the values, and starts the copies that may come once the keys are read.
template <typename Traits, typename Between>
__device__ __forceinline__ void attend_step(const AttentionParams& params, const BatchItem& item,
                                            const QueryFragments<Traits>& query,
                                            RowState<Traits>& state, int step_key,
                                            uint32 key_address, uint32 value_address, int stage,
                                            int lane, float scale, Between between) {
  using Variant = typename Traits::Variant;
  Logits<Traits> logits;
  multiply_keys<Traits>(logits, query, key_address + stage * Traits::kKeyBytes,
                        right_first_lane_offset<Traits::kKeyRowBytes>(lane), [](int) {});
  float offset[Traits::kMFrags][2];
  if (Variant::transforms_logits(params)) {
    Variant::template logits<sizeof(logits) / sizeof(float)>(params, &logits[0][0][0]);
  }
  const bool moves = find_offsets<Traits>(offset, state, logits, scale);
  if (step_key < item.seen_by_all.begin || step_key + Traits::kKeys > item.seen_by_all.end) {
    mask_logits<Traits>(logits, params, item.request, item.work, 0, step_key);
  }
  if (__any_sync(0xffffffffu, moves)) move_origins<Traits>(state, logits, offset, scale);
  Exponentials<Traits> exponentials;
  const auto take = [&](int group, int pair) {
    exponentials.take(group, pair, logits, offset, scale);
  };
#pragma unroll
  for (int group = 0; group < Traits::kEarlyGroups; ++group) {
#pragma unroll
    for (int pair = 0; pair < exponentials.kPairs; ++pair) take(group, pair);
  }
  between();
  multiply_values<Traits>(state, exponentials, take, value_address + stage * Traits::kValueBytes,
                          down_first_lane_offset<Traits::kValueRowBytes>(lane), [](int) {});
}

}  // namespace ridgeline
