// Adds up the parts that attention() left of each row when the keys were split (merge_parts.cuh),
// as a launch of its own: for tall tiles and many parts, and for calls without counters. A warp
// takes a row; rows of many parts are shared by the eight warps of a CTA. All SMs; any head_dim_vo
// that is a multiple of 8 up to 256.
#pragma once

#include "attention/merge_parts.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine(const __grid_constant__ CombineParams combined) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  const AttentionParams& params = combined.attention;
  const int warp = threadIdx.x / 32;
  const int num_splits = params.num_splits.divisor;
  const bool together = num_splits > kPartsOfGroup;
  const int row_idx = together ? int(blockIdx.x) : int(blockIdx.x) * kCombineWarps + warp;
  const int query = row_idx / params.num_qo_heads;
  const int head = row_idx - query * params.num_qo_heads;
  if (query >= params.qo_len) return;
  const int group_size = params.group_size.divisor;
  const int kv_head = params.group_size.quotient(head);
  const int packed = query * group_size + head - kv_head * group_size;
  const int q_tile = packed / combined.tile_q;
  const int slot = (q_tile * int(params.num_kv_heads.divisor) + kv_head) * num_splits;
  const CutRow row = {int64(slot) * combined.tile_q + packed - q_tile * combined.tile_q,
                      combined.tile_q, num_splits};
  const float scale = exponent_scale(params.sm_scale, params.logits_soft_cap);
  pdl_wait();
#pragma unroll 1
  for (int first = 0; first < params.head_dim_vo; first += kColumnsOfWarp) {
    const int column = first + lane_column();
    const RowSums sums = together ? add_parts_together(params, row, column, scale, of_warps)
                                  : add_parts<1>(params, row, column, scale);
    if (!together || warp == 0) store_sums<T>(params, {query, head}, column, sums, scale);
  }
}

}  // namespace ridgeline
