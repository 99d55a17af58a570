// What is left of a batch when its records are done (cut_tiles.cuh), as a launch of its own: for
// tall tiles, whose parts are too large for the CTA that finishes last, and for calls without
// counters. A warp takes a row; a row of many parts is shared by the eight warps of a CTA. All SMs;
// any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/cut_tiles.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine(const __grid_constant__ BatchAttentionParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  const AttentionParams& attention = params.attention;
  const int warp = threadIdx.x / 32;
  const int warp_idx = blockIdx.x * kCombineWarps + warp;
  const int num_warps = gridDim.x * kCombineWarps;
  pdl_wait();

  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
  clear_rows<T>(params, warp_idx, num_warps);
  if (header.tag != params.tag) return;
  const float scale = exponent_scale(attention.sm_scale, attention.logits_soft_cap);
  const int num_tiles = max(0, min(header.num_cut_tiles, params.max_cut_tiles));
  const int num_rows = num_tiles * int(params.team_size.divisor * params.slot_rows.divisor);
  const auto tile_of = [&](int i, int& row) {
    const int of_head = params.slot_rows.quotient(i);
    row = i - of_head * int(params.slot_rows.divisor);
    const int index = params.team_size.quotient(of_head);
    return checked_tile(params, cut_tiles_of(params.list)[index],
                        of_head - index * int(params.team_size.divisor));
  };
  for (int i = warp_idx; i < num_rows; i += num_warps) {
    int row;
    const CutTile tile = tile_of(i, row);
    const RowTarget target = row_target(params, tile, row);
    if (row >= tile.num_rows || tile.num_pieces > kPartsAtOnce || target.token < 0) continue;
    if (tile.num_pieces <= 0) continue;
    for (int block = 0; block < num_column_blocks(attention); ++block) {
      const int column = lane_column(block);
      store_sums<T>(attention, target, column,
                    add_parts(attention, parts_of(tile).of_row(row), column, scale), scale);
    }
  }
  if (header.most_pieces <= kPartsAtOnce) return;
  for (int i = blockIdx.x; i < num_rows; i += gridDim.x) {
    int row;
    const CutTile tile = tile_of(i, row);
    const RowTarget target = row_target(params, tile, row);
    if (row >= tile.num_rows || tile.num_pieces <= kPartsAtOnce || target.token < 0) continue;
    for (int block = 0; block < num_column_blocks(attention); ++block) {
      const int column = lane_column(block);
      const RowSums sums =
          add_parts_together(attention, parts_of(tile).of_row(row), column, scale, of_warps);
      if (warp == 0) store_sums<T>(attention, target, column, sums, scale);
    }
  }
}

}  // namespace ridgeline
