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

// A search through rows for those that are to be added up: a warp's rows of few parts, then a
// CTA's rows of many, which each of its warps finds in the same order.
struct RowSearch {
  bool together;
  int base;       // of the next 32 rows to look at
  int step;       // from each of them to the next
  int begin;      // of the last 32
  uint32 wanted;  // a bit for each of them that is still to be added up
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

  // All that the list says is found before the wait: it was complete when attention began.
  const ListHeader header = *reinterpret_cast<const ListHeader*>(params.list);
#pragma unroll 1
  for (int i = 0; i < kSegments; ++i) {
    clear_rows<T>(segments[i], i == 0 ? header.num_tokens : header.num_tokens_b, warp_idx,
                  num_warps);
  }
  // Why here: the word is on its way to the host while attention runs.
  if (kSegments == 1 && params.report != nullptr && blockIdx.x == 0 && threadIdx.x == 0 &&
      header.tag == params.tag && header.num_cut_tiles == 0 &&
      header.num_tokens >= params.num_tokens && params.max_q_len >= params.num_tokens) {
    *params.report = params.report_value;
  }
  const float scale = exponent_scale(params.attention.sm_scale, params.attention.logits_soft_cap);
  const auto params_of = [&](int segment) -> const BatchAttentionParams& {
    return segments[kSegments > 1 ? segment & 1 : 0];
  };
  const int num_tiles =
      header.tag == params.tag ? max(0, min(header.num_cut_tiles, params.max_cut_tiles)) : 0;
  const int num_rows = num_tiles * int(params.team_size.divisor * params.slot_rows.divisor);
  // Why from the last warp on, where CTAs have rows too: a CTA with both kinds takes twice as long,
  // and the first CTAs start first.
  const bool has_both = header.most_pieces > kPartsOfGroup;
  RowSearch search = {false, has_both ? num_warps - 1 - warp_idx : warp_idx, num_warps};
  // Of the row that was found.
  RowTarget target;
  CutRow parts;
  int segment;
  const auto wants = [&](int i) {
    if (i >= num_rows) return false;
    const SlotRow of(params, i);
    return of.row < of.tile.num_rows && of.tile.num_pieces > 0 &&
           (of.tile.num_pieces > kPartsOfGroup) == search.together &&
           row_target(params_of(of.tile.segment), of.tile, of.row).token >= 0;
  };
  // Rows of slots are looked at by all lanes at once: of a tall slot's most may not exist.
  const auto find = [&] {
    while (search.wanted == 0) {
      if (search.base >= num_rows) {
        if (search.together || !has_both) return false;
        search = {true, int(blockIdx.x), int(gridDim.x)};
        continue;
      }
      search.begin = search.base;
      search.base += 32 * search.step;
      search.wanted = __ballot_sync(0xffffffffu, wants(search.begin + lane * search.step));
    }
    const SlotRow of(params, search.begin + (__ffs(search.wanted) - 1) * search.step);
    search.wanted &= search.wanted - 1;
    segment = of.tile.segment;
    target = row_target(params_of(segment), of.tile, of.row);
    parts = row_parts(of.tile, of.row);
    return true;
  };
  bool found = find();
  pdl_wait();
#pragma unroll 1
  for (; found; found = find()) {
    const AttentionParams& attention = params_of(segment).attention;
#pragma unroll 1
    for (int first = 0; first < attention.head_dim_vo; first += kColumnsOfWarp) {
      const int column = first + lane_column();
      const RowSums sums =
          combine_parts(attention, parts, column, scale, search.together, of_warps);
      if (!search.together || warp == 0) store_sums<T>(attention, target, column, sums, scale);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 3)
    batch_combine(const __grid_constant__ BatchAttentionParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  combine_segments<T>(reinterpret_cast<const BatchAttentionParams(&)[1]>(params), of_warps);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 3)
    batch_combine_pair(const __grid_constant__ BatchPairParams params) {
  __shared__ RowSums of_warps[kCombineWarps][32];
  combine_segments<T>(params.segments, of_warps);
}

}  // namespace ridgeline
