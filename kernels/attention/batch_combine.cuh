// Adds up the parts of a batch's cut tiles, in the order of their keys, and clears the output rows
// that belong to no request, or to one beyond its max_q_len:
//   out = sum_p 2^((max_p - max) scale) sums_p / sum_p 2^((max_p - max) scale) sum_p
// A warp takes one row; a row of many parts is shared by the eight warps of a CTA, and what they
// found is added up in order. All SMs; any head_dim_vo that is a multiple of 8 up to 256.
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

// Some parts of a row: the largest logit, the sum of exponentials, and this lane's columns 4 * lane
// and 128 + 4 * lane of the weighted sums.
struct RowSums {
  float maximum;
  float sum;
  float4 values[2];
};

__device__ __forceinline__ void scale_by(RowSums& sums, float factor) {
  sums.sum *= factor;
#pragma unroll
  for (float4& value : sums.values) {
    value = make_float4(value.x * factor, value.y * factor, value.z * factor, value.w * factor);
  }
}

__device__ __forceinline__ void add_weighted(float4& to, float4 value, float weight) {
  to.x += weight * value.x;
  to.y += weight * value.y;
  to.z += weight * value.z;
  to.w += weight * value.w;
}

// Weights are relative to the largest logit; where there is none, to 0.
__device__ __forceinline__ float origin_of(float maximum) {
  return maximum == -kInfinity ? 0.0f : maximum;
}

// The parts first, first + step, ... of a row. Four are loaded before one is used.
__device__ __forceinline__ RowSums add_parts(const BatchCombineParams& params, const CutTile& tile,
                                             int64 row, int first, int step) {
  constexpr int kAtOnce = 4;
  const float2* all_stats = reinterpret_cast<const float2*>(params.partial_stats);
  const int column = threadIdx.x % 32 * 4;
  RowSums sums = {-kInfinity, 0.0f, {}};
#pragma unroll 1
  for (int begin = first; begin < tile.num_pieces; begin += kAtOnce * step) {
    float2 stats[kAtOnce];
    float4 values[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = begin + i * step;
      stats[i] = make_float2(-kInfinity, 0.0f);
      values[i][0] = values[i][1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (piece >= tile.num_pieces) continue;
      const int64 place = row + int64(piece) * tile.piece_stride;
      stats[i] = all_stats[place];
      const float* part = params.partial_out + place * params.head_dim_vo + column;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * 128 + column < params.head_dim_vo) {
          values[i][half] = *reinterpret_cast<const float4*>(part + half * 128);
        }
      }
    }
    float maximum = sums.maximum;
#pragma unroll
    for (const float2& stat : stats) maximum = fmaxf(maximum, stat.x);
    const float origin = origin_of(maximum);
    scale_by(sums, exp2_fast((sums.maximum - origin) * params.exponent_scale));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (stats[i].y == 0.0f) continue;
      const float weight = exp2_fast((stats[i].x - origin) * params.exponent_scale);
      sums.sum += weight * stats[i].y;
      add_weighted(sums.values[0], values[i][0], weight);
      add_weighted(sums.values[1], values[i][1], weight);
    }
    sums.maximum = maximum;
  }
  return sums;
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
                                            int row, bool shared_row, RowSums (*of_warps)[32]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  RowSums sums = add_parts(params, tile, int64(tile.partial_row) + row, shared_row ? warp : 0,
                           shared_row ? kCombineWarps : 1);
  if (shared_row) {
    __syncthreads();
    of_warps[warp][lane] = sums;
    __syncthreads();
    if (warp > 0) return;
    float maximum = -kInfinity;
#pragma unroll
    for (int other = 0; other < kCombineWarps; ++other) {
      maximum = fmaxf(maximum, of_warps[other][lane].maximum);
    }
    const float origin = origin_of(maximum);
    sums = {maximum, 0.0f, {}};
    for (int other = 0; other < min(kCombineWarps, tile.num_pieces); ++other) {
      const RowSums& part = of_warps[other][lane];
      const float weight = exp2_fast((part.maximum - origin) * params.exponent_scale);
      sums.sum += weight * part.sum;
      add_weighted(sums.values[0], part.values[0], weight);
      add_weighted(sums.values[1], part.values[1], weight);
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
  const bool empty = sums.sum == 0.0f;
  store_row<T>(params, token, head, sums.values, empty ? 0.0f : 1.0f / sums.sum,
               empty ? -kInfinity : sums.maximum * (params.exponent_scale * kLn2) + logf(sums.sum));
}

// The tile of the i-th row of all slots, its parts within the workspace, and the row in it.
__device__ __forceinline__ CutTile checked_tile(const BatchCombineParams& params, int i, int& row) {
  const int slot_rows = params.slot_rows.divisor;
  const int of_head = params.slot_rows.quotient(i);
  row = i - of_head * slot_rows;
  const int index = params.team_size.quotient(of_head);
  const int lane = params.team_size.remainder(of_head);
  const int4* words = reinterpret_cast<const int4*>(params.list + kCutTilesAt) + index * 2ll;
  const int4 a = words[0], b = words[1];
  CutTile tile = {a.x, max(0, a.y), a.z + lane, 0, 0, 0, 0, 0};
  const int last_row = params.num_partial_rows - slot_rows;
  tile.num_rows = min(a.w, slot_rows);
  tile.partial_row = max(0, min(max(0, min(b.x, last_row)) + lane * slot_rows, last_row));
  tile.piece_stride = max(1, b.z);
  const int most = (last_row - tile.partial_row) / tile.piece_stride + 1;
  tile.num_pieces = last_row < 0 ? 0 : min(b.y, most);
  return tile;
}

// Clears the rows of a segment's tokens that belong to no request, `num_used` on, or to one beyond
// its max_q_len. The segment's tokens are [first_token, end_token) of the output.
template <typename T>
__device__ __forceinline__ void clear_unused(const BatchCombineParams& params, const int* qo_indptr,
                                             int batch_size, int max_q_len, int first_token,
                                             int num_used, int end_token, int warp_idx,
                                             int num_warps) {
  const int num_tokens = end_token - first_token;
  const int used = max(0, min(num_used, num_tokens));
  fill_tokens<T>(params, first_token + used, end_token, 0.0f, -kInfinity, warp_idx, num_warps);
  if (qo_indptr == nullptr) return;
  for (int request = warp_idx; request < batch_size; request += num_warps) {
    const int64 begin = first_token + max(0, qo_indptr[request]);
    const int64 end = first_token + min(qo_indptr[request + 1], num_tokens);
    fill_tokens<T>(params, begin + max_q_len, end, 0.0f, -kInfinity, 0, 1);
  }
}

template <typename T, int kSegments = 1>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine(const __grid_constant__ BatchCombineParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  const int warp = threadIdx.x / 32;
  pdl_wait();

  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
  const int warp_idx = blockIdx.x * kCombineWarps + warp;
  const int num_warps = gridDim.x * kCombineWarps;
  // A list of another configuration: no number that could be taken for a result.
  if (header.tag != params.tag) {
    const float none = __uint_as_float(0x7fffffffu);
    fill_tokens<T>(params, 0, params.num_tokens, none, none, warp_idx, num_warps);
    return;
  }
  const int end_a = kSegments > 1 ? params.token_begin_b : params.num_tokens;
  clear_unused<T>(params, params.qo_indptr, params.batch_size, params.max_q_len, 0,
                  header.num_tokens, end_a, warp_idx, num_warps);
  if constexpr (kSegments > 1) {
    clear_unused<T>(params, params.qo_indptr_b, params.batch_size_b, params.max_q_len_b, end_a,
                    header.num_tokens_b, params.num_tokens, warp_idx, num_warps);
  }

  const int num_tiles = max(0, min(header.num_cut_tiles, params.max_cut_tiles));
  const int num_rows = num_tiles * int(params.team_size.divisor) * int(params.slot_rows.divisor);
  for (int i = warp_idx; i < num_rows; i += num_warps) {
    int row;
    const CutTile tile = checked_tile(params, i, row);
    if (row < tile.num_rows && tile.num_pieces > 0 && tile.num_pieces <= kPiecesOfAWarp) {
      combine_row<T>(params, tile, row, false, of_warps);
    }
  }
  // Why asked: a bound on the parts says little, and a look at every row takes 15 us.
  bool has_many = false;
  for (int i = threadIdx.x; i < num_tiles; i += kCombineThreads) {
    has_many |=
        reinterpret_cast<const CutTile*>(params.list + kCutTilesAt)[i].num_pieces > kPiecesOfAWarp;
  }
  if (header.most_pieces <= kPiecesOfAWarp || !__syncthreads_or(has_many)) return;
  for (int i = blockIdx.x; i < num_rows; i += gridDim.x) {
    int row;
    const CutTile tile = checked_tile(params, i, row);
    if (row < tile.num_rows && tile.num_pieces > kPiecesOfAWarp) {
      combine_row<T>(params, tile, row, true, of_warps);
    }
  }
}

}  // namespace ridgeline
