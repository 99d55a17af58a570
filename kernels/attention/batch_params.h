// What host and kernels of batched attention agree on: the work list and the parameters of the
// kernels that make it, run it and combine its parts.
//
// A work list is an int32 tensor whose length follows from shapes alone:
//   header | shares of the teams | cut tiles | records | scratch of the scheduler
//
// Teams of CTAs work on neighbouring KV heads side by side: a record stands for one tile in each of
// them, and CTA i of a team takes the i-th of these heads. A list is of one of two kinds. Shared
// out: every team of team_size CTAs has a range of records, and the ranges cost the same. By tile:
// every team is of num_kv_heads CTAs and has one record, the dearest first, and the GPU starts the
// next where one is done; a tile that is split has a CTA for as many rows as the low height has.
#pragma once

#include "attention/params.h"
#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// Where a request's keys lie, and which tensor tells how many there are.
enum class KvForm : int {
  kPagedByLastPage,  // pages kv_indptr[b] .. kv_indptr[b + 1], kv_lens = tokens on the last page
  kPagedByLength,    // pages from kv_indptr[b] on, kv_lens = tokens
  kRagged,           // tokens kv_indptr[b] .. kv_indptr[b + 1]
  kPadded,           // kv_lens tokens of row b
  kSingle,           // one request, which has all queries and all tokens
};

constexpr bool is_paged(KvForm form) {
  return form == KvForm::kPagedByLastPage || form == KvForm::kPagedByLength;
}

// One query tile against a range of keys, for each head of a team.
struct alignas(16) WorkRecord {
  int segment_height;  // segment * 256 + index of the tile height in the kernel's list of heights,
                       // + kByWarps
  int request;
  int kv_head;      // of the team's first CTA
  int q_row_begin;  // first packed row, from the request's first on
  int q_begin;      // the request's first token in q
  int qo_len;
  int kv_origin;  // where its keys begin: entry of kv_indices, token, or row of the batch
  int kv_len;
  int kv_begin, kv_end;  // keys to visit
  int partial_row;       // where the first CTA's partial result goes, or -1: results are final
  int cut_tile;          // which of the cut tiles it is a part of, where it is one
};
inline constexpr int kRecordWords = 12;
// In the records of a range of which each warp takes its own (batch_warps.cuh).
inline constexpr int kByWarps = 1 << 16;
inline constexpr int kRecordsByWarps = 4;
static_assert(sizeof(WorkRecord) == kRecordWords * 4, "whole words");

// A team's share of a list: records from begin to end, the first of them here too, so that a CTA
// needs one trip to memory to start.
struct alignas(16) TeamShare {
  WorkRecord first;
  int begin, end;
  int unused[2];
};
inline constexpr int kShareWords = 16;
static_assert(sizeof(TeamShare) == kShareWords * 4, "whole words");

// A tile whose keys were cut into parts, which lie piece_stride rows apart, in order; of the team's
// first head, with the others' parts a slot further each.
struct alignas(16) CutTile {
  int q_begin;      // the request's first token in q
  int q_row_begin;  // first packed row
  int kv_head;
  int num_rows;
  int partial_row;
  int num_pieces;
  int piece_stride;
  int segment;
};
inline constexpr int kCutTileWords = 8;
static_assert(sizeof(CutTile) == kCutTileWords * 4, "whole words");

struct ListHeader {
  int tag;      // of the configuration that the list was made for
  int by_tile;  // 0, or 1 and how many tiles of one head, the last ones, are split
  int num_records;
  int num_cut_tiles;
  int num_tokens;    // of all requests: rows of the output from here on are padding
  int most_pieces;   // no tile was cut into more
  int num_tokens_b;  // of the second segment, where there is one
  int num_ranges;    // of a list that is shared out
};

inline constexpr int kMaxBatchCtas = 1024;
inline constexpr int kSharesAt = 16;  // words; kMaxBatchCtas shares
inline constexpr int kCutTilesAt = kSharesAt + kMaxBatchCtas * kShareWords;
inline constexpr int kMaxTilesByTile = 1 << 16;  // a list by tile has fewer
inline constexpr int kMinTallTile = 64;          // rows of the smallest tile for more than 16 rows
// batch_invariant: a decoding request's keys are cut by its own length, into at most so many parts
// of at least so many KV tiles.
inline constexpr int kInvariantPieces = 8;
inline constexpr int kInvariantTiles = 8;

// The scheduler's own: what it knows of a request, and of an item.
inline constexpr int kRequestWords = 4;
inline constexpr int kItemWords = 4;

// Sizes and places of a list's parts, in words.
struct ListLayout {
  int64 max_items;  // query tiles, and parts of them where batch_invariant cuts them
  int64 max_cut_tiles;
  int64 max_records;
  int64 records_at;
  int64 requests_at;     // [batch_size] of kRequestWords
  int64 items_at;        // [max_items] of kItemWords
  int64 costs_at;        // [max_items + 1], int64
  int64 item_starts_at;  // [batch_size + 1]
  int64 num_words;
};

constexpr ListLayout list_layout(int64 batch_size, int64 num_tokens, int64 group_size,
                                 int64 num_kv_heads, bool invariant) {
  ListLayout layout = {};
  layout.max_items =
      batch_size * (invariant ? kInvariantPieces : 1) + num_tokens * group_size / kMinTallTile;
  layout.max_cut_tiles = invariant ? batch_size * num_kv_heads : kMaxBatchCtas;
  layout.max_records = layout.max_items * num_kv_heads + kMaxBatchCtas;
  layout.records_at = kCutTilesAt + layout.max_cut_tiles * kCutTileWords;
  layout.requests_at = layout.records_at + layout.max_records * kRecordWords;
  layout.items_at = layout.requests_at + batch_size * kRequestWords;
  layout.costs_at = layout.items_at + layout.max_items * kItemWords;
  layout.item_starts_at = layout.costs_at + 2 * (layout.max_items + 1);
  layout.num_words = layout.item_starts_at + batch_size + 1;
  return layout;
}

// A tile height of the kernel, and what the scheduler must know of it.
struct TileHeight {
  Divider tile_q;   // rows
  Divider kv_tile;  // keys
  int step_cost;    // time of one KV tile, relative
  Divider steps_of_cost;
  int tile_cost;     // time of a query tile beside its KV tiles
  int min_kv_tiles;  // of a part: less is not worth a partial result
};

// The time of a query tile of one KV head that sees so many KV tiles, relative.
constexpr int64 cost_of(const TileHeight& height, int num_kv_tiles) {
  return int64{height.step_cost} * num_kv_tiles + height.tile_cost;
}

// Whether decodes stay whole, a team each: the dearest costs little more than an equal share of the
// work, so that cutting it would gain less than it takes to add up its parts. `most` is the cost of
// a request, `total` that of all, each for all bundles of heads; num_units counts requests and
// bundles. What is lost and gained was measured on an H200, with 1 to 256 units of 1 to 32 KV tiles
// of 64 keys; longer ones need more than one CTA on an SM to fill the memory's time.
inline constexpr int kWholeKeys = 1024;
constexpr bool stays_whole(const TileHeight& height, int64 most, int64 total, int64 num_units,
                           int64 num_teams, int64 num_bundles) {
  constexpr int64 kCostOfParts = 22;  // as much as 5.5 KV tiles of 64 keys
  return num_units <= num_teams && total > num_units * cost_of(height, 1) &&
         most <= cost_of(height, height.kv_tile.quotient(kWholeKeys)) * num_bundles &&
         5 * num_teams * (most - kCostOfParts * num_bundles) <= 9 * total * num_bundles;
}

// Requests over one cache. Of two segments the one with fewer rows a tile comes first on the line
// of units, where it is not the first in the output.
struct ScheduleSegment {
  const int* qo_indptr;  // [batch_size + 1]; null: one token a request
  const int* kv_indptr;  // [batch_size + 1]; null: padded
  const int* kv_lens;    // [batch_size]; null: ragged
  int batch_size;
  int num_tokens;  // rows of q
  int max_q_len;   // of longer requests no more is computed
  KvForm form;
  int page_size;
  int single_kv_len;  // of kSingle
  int causal;
  int window_left;
  int num_heights;  // 1 or 2; with two, requests of up to tile_q rows of the first take it
  TileHeight heights[2];
};

// Requests are numbered through all segments.
template <int kSegments>
struct ScheduleParams {
  ScheduleSegment segments[kSegments];
  int* list;
  int64 records_at, requests_at, items_at, costs_at, item_starts_at;  // words
  int max_items;
  int batch_size;
  int num_teams;
  Divider team_count;   // num_teams
  int team_size;        // CTAs, a divisor of num_kv_heads
  Divider num_bundles;  // num_kv_heads / team_size
  int max_tiles;        // that the grid has CTAs for, where a list may be by tile; or 0
  int max_split;        // tiles of one head that it has CTAs to split
  int may_sort_finely;  // a list by tile: keys and values fit the L2 cache
  Divider num_sms;
  int max_ranges;  // of records, that the grid has teams for, at least num_teams
  int few_tiles;   // KV tiles of an item before even parts, at most, for a warp to take it alone
  Divider group_size;
  int invariant;
  int slot_rows;  // rows of a partial result
  int tag;
};
// Threads of the scheduler. Decodes are few items, and warps with nothing to do cost time.
constexpr int schedule_threads(bool tall) {
  return tall ? 512 : 256;
}
inline constexpr int kMaxScheduleCtas = 16;

// A pool of pages, or dense keys, of which a request has the part from its origin on. Offsets into
// a pool count units of 2^k elements that divide all strides, so that they fit 32 bits.
struct BatchAttentionParams {
  AttentionParams
      attention;  // its lengths, splits and token strides of k and v apply to no request
  const int* list;
  const int* kv_indices;                   // [num_indices]; null: not paged
  const int* qo_indptr;                    // [batch_size + 1]; null: every row of q is a request
  int64 records_at;                        // words
  int64 k_origin_stride, v_origin_stride;  // elements, dense: from an origin to the next
  uint32 k_page_units, k_token_units,
      k_unit;  // paged: units a page, units a token, elements a unit
  uint32 v_page_units, v_token_units, v_unit;
  int num_indices;  // entries of kv_indices; dense: tokens (ragged) or rows of the batch (padded)
  int num_pages;    // of the pool
  int max_kv_len;   // padded: tokens of a row
  KvForm form;
  Divider page_size;
  int max_records;
  int num_ctas;     // of all teams that a list which is shared out may have ranges for
  int num_at_once;  // CTAs that fit the GPU, of that kernel alone
  Divider team_size;
  Divider slot_rows;
  int max_cut_tiles;
  int num_tokens;        // rows of q
  int last_partial_row;  // from which a whole tile fits the workspace
  int last_slot_row;     // from which a whole slot fits
  int batch_size;
  int max_q_len;
  int tag;
  int64* report;  // the host's: gets the value where nothing is left to add up or clear; or null
  int64 report_value;
  int keys_are_read_once;  // so that they need not stay in the L2 cache
  float entries_of_team;   // of kv_indices, if requests share them about as they share the teams
};

// Two segments of one launch, in the order of the line; what the list has is the same in both.
struct BatchPairParams {
  BatchAttentionParams segments[2];
};

// Counters of a launch: of its CTAs, and of the parts of each cut tile, for each head of a team.
constexpr int num_batch_counters(int num_ctas) {
  return 1 + num_ctas;
}

// Tile heights that one kernel holds, ascending.
template <int... heights>
struct Heights {};
// One, for a CTA that has an SM to itself (`wide` in params.h).
template <int height>
struct WideHeight {};

constexpr int max_int(int a, int b) {
  return a > b ? a : b;
}
constexpr int min_int(int a, int b) {
  return a < b ? a : b;
}

// Threads, CTAs of an SM and shared memory of a kernel that holds two heights (or one, twice).
constexpr int batch_block_size(int head_dim_qk, int head_dim_vo, int low, int high, int sm,
                               bool wide) {
  return max_int(attention_block_size(head_dim_qk, head_dim_vo, low, sm, wide),
                 attention_block_size(head_dim_qk, head_dim_vo, high, sm, wide));
}
constexpr int batch_ctas_per_sm(int head_dim_qk, int head_dim_vo, int low, int high, int sm,
                                bool wide) {
  return min_int(attention_tile(head_dim_qk, head_dim_vo, low, sm, wide).ctas_per_sm,
                 attention_tile(head_dim_qk, head_dim_vo, high, sm, wide).ctas_per_sm);
}
// Whether a launch of two segments runs short requests a warp each (batch_warps.cuh): the first has
// tiles of 16 rows alone, and each warp has memory for its queries.
constexpr bool batch_fits_warps(int head_dim_qk, int head_dim_vo, int high_of_first, int high,
                                int sm) {
  const TileConfig tile = attention_tile(head_dim_qk, head_dim_vo, 16, sm);
  const int bytes =
      kRecordsByWarps * 16 * head_dim_qk * 2 + attention_kv_bytes(head_dim_qk, head_dim_vo, 16, sm);
  return sm >= 90 && high_of_first == 16 && tile.query_in_registers &&
         tile.warps_kv == kRecordsByWarps &&
         bytes <= attention_smem_bytes(head_dim_qk, head_dim_vo, high, sm, false);
}
constexpr int batch_smem_bytes(int head_dim_qk, int head_dim_vo, int low, int high, int sm,
                               bool rotates, bool wide) {
  return max_int(attention_smem_bytes(head_dim_qk, head_dim_vo, low, sm, rotates, wide),
                 attention_smem_bytes(head_dim_qk, head_dim_vo, high, sm, rotates, wide));
}

}  // namespace ridgeline
