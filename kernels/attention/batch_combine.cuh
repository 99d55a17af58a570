// What is left of a batch when its records are done (cut_tiles.cuh), as a launch of its own: for
// tall tiles and many parts, which are too much for the CTA that finishes last, and for calls
// without counters. A warp takes two rows at a time, or four neighbours of few parts each; a row
// of many parts is shared by the eight warps of a CTA.
// All SMs; any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/cut_tiles.cuh"
#include "attention/merge_rows.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// With so few parts, a warp has registers for so many rows.
inline constexpr int kFewParts = 4;
inline constexpr int kRowsOfFewParts = 4;

// Rows of a slot that a warp adds up together, neighbours from `first` on.
struct SlotRows {
  CutTile tile;
  int first;
  int count;
};

// One of them.
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
  int at_once;            // neighbours that are found together
  uint32 groups_of_slot;  // of these, of which a tall slot's most may not exist
  int count;              // of all slots
  int most_of_warp;       // a row of more parts is shared by a CTA's warps

  __device__ __forceinline__ CutRows(const BatchAttentionParams (&segments)[kSegments])
      : segments(segments), header(*reinterpret_cast<const ListHeader*>(first().list)) {
    const int num_tiles =
        header.tag == first().tag ? max(0, min(header.num_cut_tiles, first().max_cut_tiles)) : 0;
    const int num_slots = num_tiles * int(first().team_size.divisor);
    const uint32 slot_rows = first().slot_rows.divisor;
    const uint32 num_rows = num_slots * slot_rows;
    // Groups of parts that one warp adds up while a CTA would go through its rows.
    most_of_warp = kPartsOfGroup * max(1, int(num_rows / gridDim.x));
    const bool has_few = header.most_pieces <= kFewParts && num_rows > gridDim.x * kCombineWarps;
    at_once = has_few ? kRowsOfFewParts : 1;
    groups_of_slot = (slot_rows + at_once - 1) / uint32(at_once);
    count = num_slots * groups_of_slot;
  }

  // But for tensors and lengths that of both.
  __device__ __forceinline__ const BatchAttentionParams& first() const { return segments[0]; }
  __device__ __forceinline__ const BatchAttentionParams& of(int segment) const {
    return segments[kSegments > 1 ? segment & 1 : 0];
  }
  // The i-th in order of tiles, their heads and rows.
  __device__ __forceinline__ SlotRows rows_at(int i) const {
    const int slot = uint32(i) / groups_of_slot;
    const int index = first().team_size.quotient(slot);
    SlotRows rows;
    rows.tile = checked_tile(first(), cut_tiles_of(first().list)[index],
                             slot - index * int(first().team_size.divisor));
    rows.first = (i - slot * int(groups_of_slot)) * at_once;
    rows.count = min(at_once, rows.tile.num_rows - rows.first);
    return rows;
  }
  __device__ __forceinline__ FoundRow row_of(const SlotRows& rows, int row) const {
    return {row_target(of(rows.tile.segment), rows.tile, rows.first + row),
            row_parts(rows.tile, rows.first + row), rows.tile.segment};
  }
  __device__ __forceinline__ FoundRow at(int i) const { return row_of(rows_at(i), 0); }
  // Whether they exist and have parts, more than most_of_warp or at most so many.
  __device__ __forceinline__ bool has(int i, bool many) const {
    if (i >= count) return false;
    const SlotRows rows = rows_at(i);
    return rows.count > 0 && rows.tile.num_pieces > 0 &&
           (rows.tile.num_pieces > most_of_warp) == many && row_of(rows, 0).target.token >= 0;
  }
};

// A search through every step-th of these from base on, 32 at once.
template <bool kMany>
struct RowSearch {
  int base, step;
  int begin;
  uint32 wanted;  // a bit for each of the last 32 that is still to be added up

  __device__ __forceinline__ RowSearch(int base, int step) : base(base), step(step), wanted(0) {}

  template <int kSegments>
  __device__ __forceinline__ bool find(const CutRows<kSegments>& rows, int& found) {
    while (wanted == 0) {
      if (base >= rows.count) return false;
      begin = base;
      base += 32 * step;
      wanted = __ballot_sync(0xffffffffu, rows.has(begin + threadIdx.x % 32 * step, kMany));
    }
    found = begin + (__ffs(wanted) - 1) * step;
    wanted &= wanted - 1;
    return true;
  }
  template <int kSegments>
  __device__ __forceinline__ bool find(const CutRows<kSegments>& rows, FoundRow& row) {
    int found = 0;
    if (!find(rows, found)) return false;
    row = rows.at(found);
    return true;
  }
};

// The rows of a list whose tiles have few parts each, several at a time.
template <typename T, int kSegments>
__device__ __forceinline__ void add_neighbours(const CutRows<kSegments>& rows, int warp_idx,
                                               int num_warps, float scale) {
  RowSearch<false> own(warp_idx, num_warps);
  int found = 0;
#pragma unroll 1
  while (own.find(rows, found)) {
    const SlotRows group = rows.rows_at(found);
    const FoundRow own_row = rows.row_of(group, min(int(threadIdx.x) % 32, group.count - 1));
    pdl_wait();
    add_rows<T, kRowsOfFewParts, kFewParts>(rows.of(own_row.segment).attention,
                                            row_parts(group.tile, group.first), group.count, scale,
                                            own_row.target);
  }
  pdl_wait();
}

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

  if (rows.at_once > 1) {
    add_neighbours<T>(rows, warp_idx, num_warps, scale);
    return;
  }

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
