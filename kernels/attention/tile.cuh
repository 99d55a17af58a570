// One query tile against a range of keys: out = softmax(scale * Q K^T + mask) V by online softmax.
//
// Two tiles of shared memory per stage, K and V. Where barriers part reads and copies (sm_75 to 89,
// and tiles that leave no room for more), each arrives in a group of its own. A step n
//     waits for K(n), starts the load of V(n + stages - 1), computes P = softmax(Q K(n)^T),
//     waits for V(n), starts the load of K(n + stages), adds P V(n),
// so every load has at least half a step to arrive, with one stage too, and a barrier stands
// between the last read of a tile and the load that overwrites it (where warps share rows, the one
// for V(n) stands before the exponentials). Where arrivals are counted
// (tile_arrivals.cuh), a step
//     waits for K(n) and V(n), computes Q K(n)^T, in the middle of which it waits until all warps
//     have read step n - 1, computes P, adds P V(n) and starts among these products the loads of
//     K(n + 1) and V(n + 1),
// and no warp stops for another that is less than half a step behind.
#pragma once

#include "attention/tile_arrivals.cuh"
#include "attention/tile_capped.cuh"
#include "attention/tile_loads.cuh"
#include "attention/tile_math.cuh"
#include "attention/tile_output.cuh"
#include "attention/tile_sharing.cuh"
#include "common/opaque.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// Lane's share of an ldmatrix.x4: for operand A and for B from rows that are its k (values), the
// two 8x8 matrices further down come before those to the right; for B from rows that are its
// columns (keys) the other way round.
template <int kRowBytes>
__device__ __forceinline__ uint32 down_first_lane_offset(int lane = threadIdx.x % 32) {
  return swizzled_offset<kRowBytes>(lane % 16, lane / 16);
}
template <int kRowBytes>
__device__ __forceinline__ uint32 right_first_lane_offset(int lane = threadIdx.x % 32) {
  return swizzled_offset<kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// Rows of the tile that exist.
template <typename Traits>
__device__ __forceinline__ int tile_rows(const AttentionParams& params, const Request& request,
                                         const WorkItem& work) {
  const int num_rows = request.qo_len * int(params.group_size.divisor);
  return min(Traits::kTileQ, num_rows - work.q_row_begin);
}

// `get_work(index)` is the work item. Why not the item itself: it is made again after the loop, so
// that what only the output needs holds no register that the accumulators want. `make_kv(work)` is
// its addressing, `keep(range)` the place of a range that every step asks for; what `fetch_more()`
// starts to copy arrives before the first step. `once`: tiles whose warps split the keys read these
// as cp_async_16_once() does.
template <typename Traits, typename GetWork, typename MakeKv, typename Keep, typename FetchMore>
__device__ __forceinline__ void attend_tile(const AttentionParams& params, const Request& request,
                                            int index, GetWork get_work, MakeKv make_kv, Keep keep,
                                            FetchMore fetch_more, bool once, unsigned char* smem) {
  using Variant = typename Traits::Variant;
  constexpr int kStages = Traits::kStages;
  constexpr int kPending = 2 * (kStages - 1);  // groups younger than the one a step waits for
  // Whether warps meet before the first step. Else they wait for what the first thread writes in
  // fetch_more() with the first step's copies: it arrives itself there, which copies alone would
  // not do for what was written beside them.
  constexpr bool kMeets =
      !Traits::kCountsArrivals || Variant::kTransformsQuery || Variant::kTransformsKey;

  const WorkItem& work = get_work(index);
  const int warp = threadIdx.x / 32;
  const int pipeline = Traits::kSplitsKeys ? warp : 0;
  const int loader = Traits::kSplitsKeys ? threadIdx.x % 32 : threadIdx.x;
  const int warp_row = Traits::kSplitsKeys ? 0 : warp / Traits::kSharers * (Traits::kMFrags * 16);
  // Which half of the keys and columns is this warp's, where two share rows.
  const int own_half =
      Traits::kSharers == 1 ? 0 : __shfl_sync(0xffffffffu, warp % Traits::kSharers, 0);
  const int first_step = Traits::kCountsArrivals ? tile_arrivals().first_round : 0;
  const int first_key =
      work.kv_begin + pipeline * Traits::kKeys - first_step * Traits::kKvTile;  // of step 0
  const int end_step =
      first_step + max(0, (work.kv_end - work.kv_begin + Traits::kKvTile - 1) / Traits::kKvTile);
  const int num_rows = tile_rows<Traits>(params, request, work);

  unsigned char* key_tiles = smem + Traits::kQueryBytes + pipeline * Traits::kPipelineBytes;
  unsigned char* value_tiles = key_tiles + kStages * Traits::kKeyBytes;
  unsigned char* scratch = smem + Traits::kScratchOffset;
  const uint32 query_address = shared_address(smem);
  const uint32 key_address = shared_address(key_tiles);
  const uint32 value_address = shared_address(value_tiles);
  typename Traits::Kv kv = make_kv(work);

  const auto keys_of = [&](int step, int stage) {
    return key_copies<Traits>(params, kv, key_address + stage * Traits::kKeyBytes, loader,
                              first_key + step * Traits::kKvTile, work.kv_end);
  };
  const auto values_of = [&](int step, int stage) {
    return value_copies<Traits>(params, kv, value_address + stage * Traits::kValueBytes, loader,
                                first_key + step * Traits::kKvTile, work.kv_end);
  };
  const auto start_keys = [&](int step, int stage) {
    if (step < end_step) keys_of(step, stage).template copy_all<Traits::kSplitsKeys>(once);
    cp_async_commit();
  };
  // What the addresses of a step need from memory, ahead of its keys; its values use it too. Of the
  // last token where the step has none.
  const auto look_up = [&](int step) -> uint32 {
    return kv.template look_up<Traits::kKeys, Traits::kLoaders>(first_key + step * Traits::kKvTile,
                                                                work.kv_end);
  };
  const auto start_values = [&](int step, int stage) {
    if (step < end_step) values_of(step, stage).template copy_all<Traits::kSplitsKeys>(once);
    cp_async_commit();
  };

  uint32 answers[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (Traits::kCountsArrivals && stage > 0) break;
    answers[stage] = first_step < end_step ? look_up(first_step + stage) : 0;
  }
  load_query<Traits>(params, work, num_rows, query_address);
  if constexpr (kMeets) fetch_more();
  cp_async_commit();
  kv.turn_to(answers[0]);
  if constexpr (Traits::kCountsArrivals) {
    start_keys(first_step, first_step);
    start_values(first_step, first_step);
    if constexpr (!kMeets) {
      fetch_more();
      cp_async_commit();
    }
    // Else what waits for the first step's keys and values waits for all of it.
    if (Variant::kTransformsQuery || first_step == end_step) cp_async_wait<kMeets ? 2 : 0>();
  } else {
    start_keys(0, 0);
#pragma unroll
    for (int stage = 1; stage < kStages; ++stage) {
      start_values(stage - 1, stage - 1);
      kv.turn_to(answers[stage]);
      start_keys(stage, stage);
    }
    cp_async_wait<kPending + 1>();
  }

  if constexpr (Variant::kTransformsKey) {
    Variant::prepare(params, scratch, threadIdx.x, Traits::kNumThreads);
  }
  if (kMeets || first_step == end_step) {
    __syncthreads();
  } else {
    // A lane's places of rows, which the others have read, change as the first step begins.
    __syncwarp();
  }
  if constexpr (Traits::kCountsArrivals) {
    if (first_step < end_step) {
      if (!kMeets && threadIdx.x == 0) {
        cp_async_wait<0>();
        tile_arrivals().there.arrive();
      } else {
        tile_arrivals().there.arrive_after_copies();
      }
    }
  }
  if constexpr (Variant::kTransformsQuery) {
    Variant::template query<typename Traits::T, Traits::kQk>(
        params, request, scratch, smem, num_rows, threadIdx.x, Traits::kNumThreads,
        [&](int row) { return int(params.group_size.quotient(work.q_row_begin + row)); });
    __syncthreads();
  }
  const QueryFragments<Traits> query(
      query_address + __shfl_sync(0xffffffffu, warp_row, 0) * Traits::kQueryRowBytes,
      down_first_lane_offset<Traits::kQueryRowBytes>());
  RowState<Traits> state;

  // Steps within this range are seen whole by every row.
  const KeyRange& seen_by_all = keep({row_keys<Traits>(params, request, work, num_rows - 1).begin,
                                      row_keys<Traits>(params, request, work, 0).end});
  const float scale = Variant::exponent_scale(params);
  const CappedLogits capped(params.sm_scale, params.logits_soft_cap);

  int turn = 0;
#pragma unroll 1
  for (int step = first_step; step < end_step; ++step) {
    const int stage = Traits::kCountsArrivals ? step % 2 : turn;
    const int previous_stage = stage == 0 ? kStages - 1 : stage - 1;
    const int step_key = first_key + step * Traits::kKvTile;
    if constexpr (Traits::kCountsArrivals) {
      answers[0] = look_up(step + 1);
      tile_arrivals().there.wait(step);
    } else {
      cp_async_wait<kPending>();
      pipeline_barrier<Traits>();
      start_values(step + kStages - 1, previous_stage);
      kv.turn_to(look_up(step + kStages));
    }
    if constexpr (Variant::kTransformsKey) {
      Variant::template key<typename Traits::Element, Traits::kQk>(
          params, shared_pointer(query_address + Traits::kScratchOffset),
          shared_pointer(key_address + stage * Traits::kKeyBytes), Traits::kKeys, loader,
          Traits::kLoaders, step_key);
      pipeline_barrier<Traits>();
    }
    const uint32 key_tile = key_address + stage * Traits::kKeyBytes +
                            own_half * (Traits::kOwnKeys * Traits::kKeyRowBytes);
    const int own_key = step_key + own_half * Traits::kOwnKeys;
    const int thread = opaque(int(threadIdx.x));
    const uint32 key_lane_offset = right_first_lane_offset<Traits::kKeyRowBytes>(
        Traits::kCountsArrivals ? int(uint32(thread) % 32) : thread % 32);
    const auto start_copies = [&](int i) {
      if (Traits::kCountsArrivals && i == Traits::kCopiesAt && step + 1 < end_step) {
        keys_of(step + 1, previous_stage).copy_all();
        values_of(step + 1, previous_stage).copy_all();
        tile_arrivals().there.arrive_after_copies();
      }
    };
    if constexpr (Traits::kCapsProducts) {
      attend_capped<Traits>(
          state, capped, query, key_tile, key_lane_offset,
          value_address + stage * Traits::kValueBytes,
          down_first_lane_offset<Traits::kValueRowBytes>(),
          step_key >= seen_by_all.begin && step_key + Traits::kKeys <= seen_by_all.end,
          [&] {
            tile_arrivals().read.wait(step + 1);
            kv.turn_to(answers[0]);
          },
          [&](Logits<Traits>& logits) {
            if (step_key < seen_by_all.begin) {
              mask_logits<Traits, true, false>(logits, params, request, work, warp_row, own_key);
            }
            if (step_key + Traits::kKeys > seen_by_all.end) {
              mask_logits<Traits, false, true>(logits, params, request, work, warp_row, own_key);
            }
          },
          start_copies);
    } else {
      Logits<Traits> logits;
      multiply_keys<Traits>(logits, query, key_tile, key_lane_offset, [&](int k) {
        // Why so early: the compiler starts no reads of fragments ahead of a wait, and more of them
        // would have accumulators spilled.
        if (Traits::kCountsArrivals && k == Traits::kQk / 32 - 1) {
          tile_arrivals().read.wait(step + 1);
          kv.turn_to(answers[0]);
        }
      });

      if constexpr (Traits::kSharers > 1) {
        cp_async_wait<kPending>();
        pipeline_barrier<Traits>();
        start_keys(step + kStages, stage);
      }

      // Before the mask, which raises no logit, so that the maxima are found among the last
      // products.
      float offset[Traits::kMFrags][2];
      if (Variant::transforms_logits(params)) {
        Variant::template logits<sizeof(logits) / sizeof(float)>(params, &logits[0][0][0]);
      }
      const bool moves = find_offsets<Traits>(offset, state, logits, scale);
      if constexpr (kSm >= 90) {
        const bool ends_left = step_key < seen_by_all.begin;
        const bool ends_right = step_key + Traits::kKeys > seen_by_all.end;
        if constexpr (Traits::kCountsArrivals) {
          if (ends_left) {
            mask_logits<Traits, true, false>(logits, params, request, work, warp_row, own_key);
          }
          if (ends_right) {
            mask_logits<Traits, false, true>(logits, params, request, work, warp_row, own_key);
          }
        } else if (ends_left || ends_right) {
          mask_logits<Traits>(logits, params, request, work, warp_row, own_key);
        }
      } else if (step_key < seen_by_all.begin || step_key + Traits::kKeys > seen_by_all.end) {
        // Why apart: both bounds ahead of the branch were compiled and measured from sm_90 on only.
        mask_logits<Traits>(logits, params, request, work, warp_row, step_key);
      }
      bool moved = __any_sync(0xffffffffu, moves);
      if (moved) {
        if constexpr (Traits::kSharers > 1) {
          if (step == first_step) {
            Sharing<Traits>::of_tile().hear_maxima(state, logits);
            moved = false;
          }
        }
        move_origins<Traits>(state, logits, offset, scale);
      }
      Exponentials<Traits> exponentials;
      const auto take = [&](int group, int pair) {
        exponentials.take(group, pair, logits, offset, scale);
      };
#pragma unroll
      for (int group = 0; group < Traits::kEarlyGroups; ++group) {
#pragma unroll
        for (int pair = 0; pair < exponentials.kPairs; ++pair) take(group, pair);
      }

      const uint32 value_tile = value_address + stage * Traits::kValueBytes +
                                own_half * (Traits::kOwnKeys * Traits::kValueRowBytes +
                                            Traits::kOwnVo * int(sizeof(typename Traits::Element)));
      const uint32 value_lane_offset = down_first_lane_offset<Traits::kValueRowBytes>();
      if constexpr (Traits::kSharers > 1) {
        Sharing<Traits>::of_tile().tell(exponentials, state, moved);
      } else if constexpr (!Traits::kCountsArrivals) {
        cp_async_wait<kPending>();
        pipeline_barrier<Traits>();
        start_keys(step + kStages, stage);
      }
      multiply_values<Traits>(state, exponentials, take, value_tile, value_lane_offset,
                              start_copies);
      if constexpr (Traits::kSharers > 1) {
        Sharing<Traits>::wait_for_other();
        Exponentials<Traits> others;
        Sharing<Traits>::of_tile().hear(others, state, moved, scale);
        multiply_values<Traits>(
            state, others, take,
            value_tile + (1 - 2 * own_half) * (Traits::kOwnKeys * Traits::kValueRowBytes),
            value_lane_offset, [](int) {});
      }
    }
    if constexpr (Traits::kCountsArrivals) {
      __syncwarp();
      if (opaque(int(threadIdx.x)) % 32 == 0) tile_arrivals().read.arrive();
    }
    turn = turn == kStages - 1 ? 0 : turn + 1;
  }

  if constexpr (Traits::kCountsArrivals) {
    if (threadIdx.x == 0) tile_arrivals().first_round = end_step % 2;
  }
  if constexpr (Traits::kCapsProducts) {
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
      state.maximum[m][0] = state.maximum[m][1] = capped.origin(params.logits_soft_cap);
    }
  }
  if constexpr (Traits::kSharers > 1) Sharing<Traits>::of_tile().add_up(state.sum);
  pdl_launch_dependents();
  const WorkItem& target = get_work(opaque(index));
  const int target_rows = tile_rows<Traits>(params, request, target);
  if constexpr (Traits::kSplitsKeys) {
    merge_and_store<Traits>(params, target, state, scale,
                            shared_pointer(query_address) + Traits::kQueryBytes, target_rows);
  } else if (target.partial_row >= 0) {
    store_partial<Traits>(params, target, state, warp_row, own_half, target_rows);
  } else {
    store_final<Traits>(params, target, state, scale, shared_pointer(query_address), warp_row,
                        own_half, target_rows);
  }
}

}  // namespace ridgeline
