// What is left of a batch once its records are done: the parts of cut tiles are added up, and
// output rows cleared that belong to no request, or to one beyond its max_q_len.
#pragma once

#include "attention/batch_params.h"
#include "attention/merge_parts.cuh"

namespace ridgeline {

// A cut tile as the list has it, for head `lane` of its team, with its parts within the workspace.
__device__ __forceinline__ CutTile checked_tile(const BatchAttentionParams& params, CutTile tile,
                                                int lane) {
  const int slot_rows = params.slot_rows.divisor;
  const int first = max(0, min(tile.partial_row, params.last_slot_row));
  tile.q_row_begin = max(0, tile.q_row_begin);
  tile.kv_head += lane;
  tile.num_rows = min(tile.num_rows, slot_rows);
  tile.partial_row = max(0, min(first + lane * slot_rows, params.last_slot_row));
  tile.piece_stride = max(1, tile.piece_stride);
  const int most = (params.last_slot_row - tile.partial_row) / tile.piece_stride + 1;
  tile.num_pieces = params.last_slot_row < 0 ? 0 : min(tile.num_pieces, most);
  return tile;
}

__device__ __forceinline__ const CutTile* cut_tiles_of(const int* list) {
  return reinterpret_cast<const CutTile*>(list + kCutTilesAt);
}

__device__ __forceinline__ CutRow row_parts(const CutTile& tile, int row) {
  return {int64(tile.partial_row) + row, tile.piece_stride, tile.num_pieces};
}

// Where a row of a cut tile goes; token -1: nowhere, the list is wrong.
__device__ __forceinline__ RowTarget row_target(const BatchAttentionParams& params,
                                                const CutTile& tile, int row) {
  RowTarget target =
      row_target(params.attention, tile.kv_head, tile.q_begin, tile.q_row_begin, row);
  if (tile.q_begin < 0 || target.token < tile.q_begin || target.token >= params.num_tokens ||
      target.head < 0 || target.head >= params.attention.num_qo_heads) {
    target.token = -1;
  }
  return target;
}

// The same value for every element of the tokens [begin, end), and one LSE.
template <typename T>
__device__ __forceinline__ void fill_tokens(const AttentionParams& params, int begin, int end,
                                            float value, float lse, int first_warp, int num_warps) {
#pragma unroll 1
  for (int token = begin + first_warp; token < end; token += num_warps) {
#pragma unroll 1
    for (int head = 0; head < params.num_qo_heads; ++head) {
#pragma unroll 1
      for (int column = lane_column(); column < params.head_dim_vo; column += kColumnsOfWarp) {
        store_columns<T>(params, {token, head}, column, make_float4(value, value, value, value),
                         1.0f);
      }
      if (threadIdx.x % 32 == 0 && params.lse != nullptr) {
        params.lse[int64(token) * params.num_qo_heads + head] = lse;
      }
    }
  }
}

// Clears the rows that no record writes: from the `num_used` tokens of all requests on. Of a list
// of another configuration, all of them, to what could not be taken for a result.
template <typename T>
__device__ __forceinline__ void clear_rows(const BatchAttentionParams& params, int num_used,
                                           int first_warp, int num_warps) {
  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
  const bool refused = header.tag != params.tag;
  if (!refused && params.qo_indptr == nullptr) return;
  const int num_requests = refused || params.max_q_len >= params.num_tokens ? 0 : params.batch_size;
  const float value = refused ? __uint_as_float(0x7fffffffu) : 0.0f;
  const float lse = refused ? value : -kInfinity;
  // Ranges of tokens: what no request has, by all warps, then what is too long of each request.
  int begin = refused ? 0 : max(0, min(num_used, params.num_tokens));
  int end = params.num_tokens;
  int step = num_warps;
#pragma unroll 1
  for (int request = first_warp;; request += num_warps) {
    fill_tokens<T>(params.attention, begin, end, value, lse, step == 1 ? 0 : first_warp, step);
    if (request >= num_requests) return;
    const int64 first = max(0, params.qo_indptr[request]);
    end = min(params.qo_indptr[request + 1], params.num_tokens);
    begin = int(min(first + params.max_q_len, int64(params.num_tokens)));
    step = 1;
  }
}

// The tiles that a CTA's first and last record are parts of.
struct OwnCuts {
  CutTile tiles[2];
  int index[2];       // in the list's tiles, or -1
  bool completes[2];  // it counted the last part
};

// Counts a CTA's parts, all of whose threads wrote them before a barrier. One thread calls it.
__device__ __forceinline__ void count_parts(const BatchAttentionParams& params, OwnCuts& cuts,
                                            int lane) {
  int counted[2] = {};
  __threadfence();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (cuts.index[i] < 0) continue;
    const int place = cuts.index[i] * int(params.team_size.divisor) + lane;
    counted[i] = atomicAdd(params.attention.counters + 1 + min(place, params.num_ctas - 1), 1);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    cuts.tiles[i] = checked_tile(params, cuts.tiles[i], lane);
    cuts.completes[i] = cuts.index[i] >= 0 && counted[i] + 1 == cuts.tiles[i].num_pieces;
  }
  __threadfence();
}

// After a CTA's records: counts its parts, and adds up the tiles that are complete with them. The
// last CTA of all sets all counters to 0 again, whatever the list said.
template <typename T, int kWarps, int kGroups>
__device__ __forceinline__ void finish(const BatchAttentionParams& params, OwnCuts& cuts,
                                       int lane) {
  __shared__ bool is_last;
  const AttentionParams& attention = params.attention;
  int ctas_before = 0;
  if (threadIdx.x == 0) {
    count_parts(params, cuts, lane);
    // Why now: the answer arrives while tiles are added up.
    ctas_before = atomicAdd(attention.counters, 1);
  }
  __syncthreads();
  const float scale = exponent_scale(attention.sm_scale, attention.logits_soft_cap);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (!cuts.completes[i]) continue;
    const CutTile& tile = cuts.tiles[i];
    merge_tile<T, kWarps, kGroups>(
        attention, tile.num_rows, scale, [&](int row) { return row_parts(tile, row); },
        [&](int row) { return row_target(params, tile, row); });
  }
  if (threadIdx.x == 0) is_last = ctas_before + 1 == params.num_ctas;
  __syncthreads();
  if (!is_last) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_batch_counters(params.num_ctas); i += kWarps * 32) {
    attention.counters[i] = 0;
  }
}

}  // namespace ridgeline
