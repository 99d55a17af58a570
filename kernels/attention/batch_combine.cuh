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

// A row that is to be added up.
struct FoundRow {
  RowTarget target;
  CutRow parts;
  int segment;
};

// What the list says of a launch's cut tiles.
template <int kSegments>
struct CutRows {
  const BatchAttentionParams (&segments)[kSegments];
  ListHeader header;
  int count;         // rows of slots, of which a tall slot's most may not exist
  int most_of_warp;  // a row of more parts is shared by a CTA's warps

  __device__ __forceinline__ CutRows(const BatchAttentionParams (&segments)[kSegments])
      : segments(segments), header(*reinterpret_cast<const ListHeader*>(first().list)) {
    const int num_tiles =
        header.tag == first().tag ? max(0, min(header.num_cut_tiles, first().max_cut_tiles)) : 0;
    count = num_tiles * int(first().team_size.divisor * first().slot_rows.divisor);
    // Groups of parts that one warp adds up while a CTA would go through its rows.
    most_of_warp = kPartsOfGroup * max(1, int(uint32(count) / gridDim.x));
  }

  // But for tensors and lengths that of both.
  __device__ __forceinline__ const BatchAttentionParams& first() const { return segments[0]; }
  __device__ __forceinline__ const BatchAttentionParams& of(int segment) const {
    return segments[kSegments > 1 ? segment & 1 : 0];
  }
  __device__ __forceinline__ FoundRow at(int i) const {
    const SlotRow of_slot(first(), i);
    const int segment = of_slot.tile.segment;
    return {row_target(of(segment), of_slot.tile, of_slot.row),
            row_parts(of_slot.tile, of_slot.row), segment};
  }
  // Whether it exists and has parts, more than most_of_warp or at most so many.
  __device__ __forceinline__ bool has(int i, bool many) const {
    if (i >= count) return false;
    const SlotRow of_slot(first(), i);
    return of_slot.row < of_slot.tile.num_rows && of_slot.tile.num_pieces > 0 &&
           (of_slot.tile.num_pieces > most_of_warp) == many &&
           row_target(of(of_slot.tile.segment), of_slot.tile, of_slot.row).token >= 0;
  }
};

// A search through every step-th row from base on, 32 at once.
template <bool kMany>
struct RowSearch {
  int base, step;
  int begin;
  uint32 wanted;  // a bit for each of the last 32 that is still to be added up

  __device__ __forceinline__ RowSearch(int base, int step) : base(base), step(step), wanted(0) {}

  template <int kSegments>
  __device__ __forceinline__ bool find(const CutRows<kSegments>& rows, FoundRow& row) {
    while (wanted == 0) {
      if (base >= rows.count) return false;
      begin = base;
      base += 32 * step;
      wanted = __ballot_sync(0xffffffffu, rows.has(begin + threadIdx.x % 32 * step, kMany));
    }
    row = rows.at(begin + (__ffs(wanted) - 1) * step);
    wanted &= wanted - 1;
    return true;
  }
};

// A launch of one batch, or of two, whose cut tiles tell of which they are.
template <typename T, int kSegments>
__device__ __forceinline__ void combine_segments(const BatchAttentionParams (&segments)[kSegments],
                                                 RowSums (&of_warps)[kCombineWarps][32]) {
  const BatchAttentionParams& params = segments[0];
  const int warp = threadIdx.x / 32;
  const int warp_idx = blockIdx.x * kCombineWarps + warp;
  const int num_warps = gridDim.x * kCombineWarps;

  // All that the list says is found before the wait: it was complete when attention began.
  const CutRows<kSegments> rows(segments);
  const ListHeader& header = rows.header;
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
  if (rows.count == 0) {
    pdl_wait();
    return;
  }
  const AttentionParams& attention = params.attention;
  const float scale = exponent_scale(attention.sm_scale, attention.logits_soft_cap);

  // A warp's own rows, two at a time, so that it waits for both at once. Why from the last warp on,
  // where CTAs have rows too: a CTA with both kinds takes twice as long, and the first CTAs start
  // first.
  const bool has_both = header.most_pieces > rows.most_of_warp;
  RowSearch<false> own(has_both ? num_warps - 1 - warp_idx : warp_idx, num_warps);
  FoundRow row = {}, second = {};
  bool found = own.find(rows, row);
  bool finds_second = found && own.find(rows, second);
  if (!finds_second) second = {};
  if (found) pdl_wait();
#pragma unroll 1
  while (found) {
#pragma unroll 1
    for (int first = 0; first < attention.head_dim_vo; first += kColumnsOfWarp) {
      const int column = first + lane_column();
      RowSums sums = no_sums(), sums_of_second = no_sums();
      const int most = max(row.parts.num_parts, second.parts.num_parts);
#pragma unroll 1
      for (int begin = 0; begin < most; begin += kPartsOfGroup) {
        const PartsAtOnce<1> parts(attention, row.parts, begin, column);
        const PartsAtOnce<1> of_second(attention, second.parts, begin, column);
        parts.add_to(sums, scale);
        of_second.add_to(sums_of_second, scale);
      }
      store_sums<T>(rows.of(row.segment).attention, row.target, column, sums, scale);
      if (!finds_second) continue;
      store_sums<T>(rows.of(second.segment).attention, second.target, column, sums_of_second,
                    scale);
    }
    found = own.find(rows, row);
    finds_second = found && own.find(rows, second);
    if (!finds_second) second = {};
  }

  // A CTA's rows, which each of its warps finds in the same order.
  RowSearch<true> shared(has_both ? int(blockIdx.x) : rows.count, gridDim.x);
  found = shared.find(rows, row);
  pdl_wait();
#pragma unroll 1
  for (; found; found = shared.find(rows, row)) {
#pragma unroll 1
    for (int first = 0; first < attention.head_dim_vo; first += kColumnsOfWarp) {
      const int column = first + lane_column();
      const RowSums sums = add_parts_together(attention, row.parts, column, scale, of_warps);
      if (warp == 0) {
        store_sums<T>(rows.of(row.segment).attention, row.target, column, sums, scale);
      }
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
