// What is left of a batch when its records are done (cut_tiles.cuh), as a launch of its own: for
// tall tiles and many parts, which are too much for the CTA that finishes last, and for calls
// without counters. A warp takes a row; a row of many parts is shared by the eight warps of a CTA.
// All SMs; any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/cut_tiles.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// Row `row` of the i-th rows of all slots, in order of tiles, their heads and rows.
struct SlotRow {
  CutTile tile;
  int row;

  __device__ __forceinline__ SlotRow(const BatchAttentionParams& params, int i) {
    const int of_head = params.slot_rows.quotient(i);
    const int index = params.team_size.quotient(of_head);
    row = i - of_head * int(params.slot_rows.divisor);
    tile = checked_tile(params, cut_tiles_of(params.list)[index],
                        of_head - index * int(params.team_size.divisor));
  }
};

// A launch of one batch, or of two, whose cut tiles tell of which they are.
template <typename T, int kSegments>
__device__ __forceinline__ void combine_segments(const BatchAttentionParams (&segments)[kSegments],
                                                 RowSums (&of_warps)[kCombineWarps][32]) {
  const BatchAttentionParams& params = segments[0];  // but for tensors and lengths that of both
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_idx = blockIdx.x * kCombineWarps + warp;
  const int num_warps = gridDim.x * kCombineWarps;
  pdl_wait();

  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
#pragma unroll 1
  for (int i = 0; i < kSegments; ++i) {
    clear_rows<T>(segments[i], i == 0 ? header.num_tokens : header.num_tokens_b, warp_idx,
                  num_warps);
  }
  if (header.tag != params.tag) return;
  const float scale = exponent_scale(params.attention.sm_scale, params.attention.logits_soft_cap);
  const auto segment_of = [&](const SlotRow& of) -> const BatchAttentionParams& {
    return segments[kSegments > 1 ? of.tile.segment & 1 : 0];
  };
  const int num_tiles = max(0, min(header.num_cut_tiles, params.max_cut_tiles));
  const int num_rows = num_tiles * int(params.team_size.divisor * params.slot_rows.divisor);
  // Rows of slots are looked at by all lanes at once: of a tall slot's most may not exist.
  const auto wants = [&](int i, bool together) {
    if (i >= num_rows) return false;
    const SlotRow of(params, i);
    return of.row < of.tile.num_rows && of.tile.num_pieces > 0 &&
           (of.tile.num_pieces > kPartsOfGroup) == together &&
           row_target(segment_of(of), of.tile, of.row).token >= 0;
  };
  const auto combine = [&](int i, bool together) {
    const SlotRow of(params, i);
    const AttentionParams& attention = segment_of(of).attention;
    const RowTarget target = row_target(segment_of(of), of.tile, of.row);
    const CutRow parts = row_parts(of.tile, of.row);
#pragma unroll 1
    for (int first = 0; first < attention.head_dim_vo; first += kColumnsOfWarp) {
      const int column = first + lane_column();
      const RowSums sums = together ? add_parts_together(attention, parts, column, scale, of_warps)
                                    : add_parts<1>(attention, parts, column, scale);
      if (!together || warp == 0) store_sums<T>(attention, target, column, sums, scale);
    }
  };
#pragma unroll 1
  for (int base = warp_idx; base < num_rows; base += 32 * num_warps) {
    uint32 wanted = __ballot_sync(0xffffffffu, wants(base + lane * num_warps, false));
    for (; wanted != 0; wanted &= wanted - 1) {
      combine(base + (__ffs(wanted) - 1) * num_warps, false);
    }
  }
  if (header.most_pieces <= kPartsOfGroup) return;
  // Every warp of a CTA finds the same.
#pragma unroll 1
  for (int base = blockIdx.x; base < num_rows; base += 32 * gridDim.x) {
    uint32 wanted = __ballot_sync(0xffffffffu, wants(base + lane * gridDim.x, true));
    for (; wanted != 0; wanted &= wanted - 1) {
      combine(base + (__ffs(wanted) - 1) * gridDim.x, true);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine(const __grid_constant__ BatchAttentionParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  combine_segments<T>(reinterpret_cast<const BatchAttentionParams(&)[1]>(params), of_warps);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 2)
    batch_combine_pair(const __grid_constant__ BatchPairParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  combine_segments<T>(params.segments, of_warps);
}

}  // namespace ridgeline
