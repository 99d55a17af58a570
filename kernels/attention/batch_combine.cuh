// What is left of a batch when its records are done (cut_tiles.cuh), as a launch of its own: for
// tall tiles, whose parts are too large for the CTA that finishes last, and for calls without
// counters. A warp takes a row; a row of very many parts is shared by the eight warps of a CTA. All
// SMs; any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/cut_tiles.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine(const __grid_constant__ BatchAttentionParams params) {
  const AttentionParams& attention = params.attention;
  const int warp_idx = blockIdx.x * kCombineWarps + threadIdx.x / 32;
  const int num_warps = gridDim.x * kCombineWarps;
  pdl_wait();

  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
  clear_rows<T>(params, warp_idx, num_warps);
  if (header.tag != params.tag) return;
  const float scale = exponent_scale(attention.sm_scale, attention.logits_soft_cap);
  const int num_tiles = max(0, min(header.num_cut_tiles, params.max_cut_tiles));
  const int num_rows = num_tiles * int(params.team_size.divisor * params.slot_rows.divisor);
  // The i-th row of all slots: by a warp of its own, or by a CTA.
  const auto combine_row = [&](int i, bool by_cta) {
    const int of_head = params.slot_rows.quotient(i);
    const int row = i - of_head * int(params.slot_rows.divisor);
    const int index = params.team_size.quotient(of_head);
    const CutTile tile = checked_tile(params, cut_tiles_of(params.list)[index],
                                      of_head - index * int(params.team_size.divisor));
    const CutParts parts = parts_of(tile);
    if (row >= tile.num_rows || tile.num_pieces <= 0 || parts.in_groups() != by_cta) return;
    const RowTarget target = row_target(params, tile, row);
    if (by_cta) {
      combine_by_cta<T>(attention, parts, row, target, scale);
    } else {
      merge_row<T>(attention, parts.of_row(row), target, false, scale, InRegisters{});
    }
  };
  for (int i = warp_idx; i < num_rows; i += num_warps) combine_row(i, false);
  if (header.most_pieces <= kMaxPartsOfWarp) return;
  for (int i = blockIdx.x; i < num_rows; i += gridDim.x) combine_row(i, true);
}

}  // namespace ridgeline
