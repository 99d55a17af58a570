// Adds up the parts of a batch's cut tiles, in the order of their keys, and clears the output rows
// that belong to no request, or to one beyond its max_q_len:
//   out = sum_p 2^((max_p - max) scale) sums_p / sum_p 2^((max_p - max) scale) sum_p
// A warp takes one row; with many parts, the eight warps of a CTA share one and are added up in
// order. All SMs; any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/batch_params.h"
#include "attention/combine.cuh"
#include "common/fast_math.cuh"
#include "common/pack.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

inline constexpr int kCombineWarps = kCombineThreads / 32;
inline constexpr int kPiecesOfAWarp = 8;  // from more parts on, all warps share a row

template <typename T>
__device__ __forceinline__ void store_four(T* out, float4 values) {
  *reinterpret_cast<uint2*>(out) =
      make_uint2(pack_pair<T>(values.x, values.y), pack_pair<T>(values.z, values.w));
}

// This warp's share of a row: columns 4 * lane and 128 + 4 * lane of the parts first, first + step,
// ... weighted against the row's largest logit.
__device__ __forceinline__ void add_pieces(const BatchCombineParams& params, int64 row,
                                           const CutTile& tile, int first, int step, float origin,
                                           float4 (&values)[2]) {
  const float2* stats = reinterpret_cast<const float2*>(params.partial_stats);
  const int lane = threadIdx.x % 32;
  values[0] = values[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int piece = first; piece < tile.num_pieces; piece += step) {
    const int64 place = row + int64(piece) * tile.piece_stride;
    const float2 part = stats[place];
    const float weight = exp2_fast((part.x - origin) * params.exponent_scale);
    const bool empty = part.y == 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = half * 128 + lane * 4;
      if (column >= params.head_dim_vo) continue;
      const float4 sums = *reinterpret_cast<const float4*>(params.partial_out +
                                                           place * params.head_dim_vo + column);
      values[half].x += empty ? 0.0f : weight * sums.x;
      values[half].y += empty ? 0.0f : weight * sums.y;
      values[half].z += empty ? 0.0f : weight * sums.z;
      values[half].w += empty ? 0.0f : weight * sums.w;
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_row(const BatchCombineParams& params, int token, int head,
                                          const float4 (&values)[2], float factor, float lse) {
  const int lane = threadIdx.x % 32;
  T* out =
      static_cast<T*>(params.out) + token * params.out_stride_token + head * params.out_stride_head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = half * 128 + lane * 4;
    if (column >= params.head_dim_vo) continue;
    store_four(out + column, make_float4(values[half].x * factor, values[half].y * factor,
                                         values[half].z * factor, values[half].w * factor));
  }
  if (lane == 0 && params.lse != nullptr) {
    params.lse[int64(token) * params.num_qo_heads + head] = lse;
  }
}

// The same value for every element of the tokens [begin, end), and one LSE.
template <typename T>
__device__ __forceinline__ void fill_tokens(const BatchCombineParams& params, int64 begin,
                                            int64 end, float value, float lse, int first_warp,
                                            int num_warps) {
  const float4 ones = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  const float4 values[2] = {ones, ones};
  const int64 num_heads = params.num_qo_heads;
  for (int64 i = begin * num_heads + first_warp; i < end * num_heads; i += num_warps) {
    store_row<T>(params, int(i / num_heads), int(i % num_heads), values, value, lse);
  }
}

// One row of a cut tile, by one warp or by all of the CTA (`shared_row`).
template <typename T>
__device__ __forceinline__ void combine_row(const BatchCombineParams& params, const CutTile& tile,
                                            int row, bool shared_row, float4 (*warp_values)[64]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const float2* stats = reinterpret_cast<const float2*>(params.partial_stats);
  const int64 first_row = int64(tile.partial_row) + row;
  const float scale = params.exponent_scale;
  float2 total = make_float2(-kInfinity, 0.0f);
  for (int piece = lane; piece < tile.num_pieces; piece += 32) {
    total = merge_stats(total, stats[first_row + int64(piece) * tile.piece_stride], scale);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float2 other = make_float2(__shfl_xor_sync(0xffffffffu, total.x, distance),
                                     __shfl_xor_sync(0xffffffffu, total.y, distance));
    total = merge_stats(total, other, scale);
  }
  const float origin = total.x == -kInfinity ? 0.0f : total.x;
  float4 values[2];
  add_pieces(params, first_row, tile, shared_row ? warp : 0, shared_row ? kCombineWarps : 1, origin,
             values);
  if (shared_row) {
    __syncthreads();
    warp_values[warp][lane] = values[0];
    warp_values[warp][32 + lane] = values[1];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int other = 1; other < kCombineWarps; ++other) {
        const float4 sums = warp_values[other][half * 32 + lane];
        values[half].x += sums.x;
        values[half].y += sums.y;
        values[half].z += sums.z;
        values[half].w += sums.w;
      }
    }
  }
  const int packed = tile.q_row_begin + row;
  const int query = params.group_size.quotient(packed);
  const int head = tile.kv_head * int(params.group_size.divisor) + packed -
                   query * int(params.group_size.divisor);
  const int token = tile.q_begin + query;
  if (tile.q_begin < 0 || query < 0 || token < 0 || token >= params.num_tokens || head < 0 ||
      head >= params.num_qo_heads) {
    return;
  }
  const bool empty = total.y == 0.0f;
  store_row<T>(params, token, head, values, empty ? 0.0f : 1.0f / total.y,
               empty ? -kInfinity : total.x * (scale * kLn2) + logf(total.y));
}

// The parts of a tile within the workspace.
__device__ __forceinline__ CutTile checked_tile(const BatchCombineParams& params, int index) {
  const int4* words = reinterpret_cast<const int4*>(params.list + kCutTilesAt) + index * 2ll;
  const int4 a = words[0], b = words[1];
  CutTile tile = {a.x, max(0, a.y), a.z, 0, 0, 0, 0, 0};
  const int slot_rows = params.slot_rows.divisor;
  tile.num_rows = min(a.w, slot_rows);
  tile.partial_row = max(0, min(b.x, params.num_partial_rows - slot_rows));
  tile.piece_stride = max(1, b.z);
  const int most = (params.num_partial_rows - slot_rows - tile.partial_row) / tile.piece_stride + 1;
  tile.num_pieces = params.num_partial_rows < slot_rows ? 0 : min(b.y, most);
  return tile;
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine(const __grid_constant__ BatchCombineParams params) {
  __shared__ float4 warp_values[kCombineWarps][64];
  const int warp = threadIdx.x / 32;
  const int slot_rows = params.slot_rows.divisor;
  pdl_wait();

  // A list of another configuration: no number that could be taken for a result.
  const bool refused = params.list[0] != params.tag;
  const int num_tokens =
      refused ? 0
              : max(0, min(reinterpret_cast<const ListHeader*>(params.list)->num_tokens,
                           params.num_tokens));
  const float value = refused ? __uint_as_float(0x7fffffffu) : 0.0f;
  const float lse = refused ? value : -kInfinity;
  const int warp_idx = blockIdx.x * kCombineWarps + warp;
  const int num_warps = gridDim.x * kCombineWarps;
  fill_tokens<T>(params, num_tokens, params.num_tokens, value, lse, warp_idx, num_warps);
  if (refused) return;
  if (params.qo_indptr != nullptr) {
    for (int request = warp_idx; request < params.batch_size; request += num_warps) {
      const int64 begin = max(0, params.qo_indptr[request]);
      const int64 end = min(params.qo_indptr[request + 1], params.num_tokens);
      fill_tokens<T>(params, begin + params.max_q_len, end, 0.0f, -kInfinity, 0, 1);
    }
  }

  const int num_tiles = max(0, min(reinterpret_cast<const ListHeader*>(params.list)->num_cut_tiles,
                                   params.max_cut_tiles));
  const int rounds_of_tile = (slot_rows + kCombineWarps - 1) / kCombineWarps;
  const int64 num_rounds = int64(num_tiles) * rounds_of_tile;
  for (int64 round = blockIdx.x; round < num_rounds; round += gridDim.x) {
    const CutTile tile = checked_tile(params, int(round / rounds_of_tile));
    if (tile.num_pieces < 1) continue;
    const int first_row = int(round % rounds_of_tile) * kCombineWarps;
    if (tile.num_pieces <= kPiecesOfAWarp) {
      const int row = first_row + warp;
      if (row < tile.num_rows) combine_row<T>(params, tile, row, false, warp_values);
    } else {
      for (int row = first_row; row < min(first_row + kCombineWarps, tile.num_rows); ++row) {
        combine_row<T>(params, tile, row, true, warp_values);
      }
    }
  }
}

}  // namespace ridgeline
