// What a CTA is told to do: one query tile of one KV head against a range of keys.
#pragma once

#include "attention/params.h"

namespace ridgeline {

struct Request {
  int qo_len;
  int kv_len;
};

struct KeyRange {
  int begin, end;
};

struct WorkItem {
  int segment;  // which problem of the launch
  int request;  // which sequence of the segment
  int kv_head;
  int q_row_begin;  // first packed row (query * group_size + query head within the group)
  int kv_begin;     // keys to visit; kv_begin is a multiple of the KV tile
  int kv_end;
  int partial_row;  // where the rows of the partial result go, or -1: the result is final
  int q_begin;      // the request's first token in q
};

// The record of a batch that a CTA works on, with every field in its range. It lies in shared
// memory: what is read again where it is used holds no register.
struct BatchItem {
  WorkItem work;
  Request request;
  KeyRange seen_by_all;  // keys that every row of the tile sees
  uint64 key_address;    // what addresses of the item's keys begin with
  uint64 value_address;
  uint64 table_address;  // of the request's first page number, where there are pages
  int height_idx;        // in the kernel's list of tile heights
};

// The keys that a query sees. Query i stands at key i + kv_len - qo_len; causal queries see no key
// after it, windowed ones none further back than window_left (-1: no window). The range may be
// empty.
__device__ __forceinline__ KeyRange masked_keys(const Request& request, int query, bool causal,
                                                int window_left) {
  const int diagonal = query + request.kv_len - request.qo_len;
  const int end = causal ? min(request.kv_len, diagonal + 1) : request.kv_len;
  const int begin = window_left >= 0 ? max(0, diagonal - window_left) : 0;
  return {begin, end};
}

// Keys that any of the packed rows [row_begin, row_end) sees. Bounds grow with the query, so its
// ends decide.
template <typename Variant>
__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& params,
                                                 const Request& request, int row_begin,
                                                 int row_end) {
  const int first_query = params.group_size.quotient(row_begin);
  const int last_query = params.group_size.quotient(row_end - 1);
  return {Variant::mask(params, request, first_query).begin,
          Variant::mask(params, request, last_query).end};
}

// The item of a grid over one request: KV heads fastest, so that CTAs which start together read
// different heads at the same depth; then splits; query tiles last first, since under a causal mask
// the last are the longest.
template <typename Variant, int kTileQ, int kKvTile>
__device__ __forceinline__ WorkItem single_request_item(const AttentionParams& params, int index) {
  const int num_kv_heads = params.num_kv_heads.divisor;
  const int num_splits = params.num_splits.divisor;
  const int rest = params.num_kv_heads.quotient(index);
  const int kv_head = index - rest * num_kv_heads;
  const int tiles_left = params.num_splits.quotient(rest);
  const int split = rest - tiles_left * num_splits;
  const int q_tile = params.num_q_tiles - 1 - tiles_left;

  const Request request = {params.qo_len, params.kv_len};
  const int num_rows = params.qo_len * int(params.group_size.divisor);
  const int row_begin = q_tile * kTileQ;
  const KeyRange keys =
      visible_keys<Variant>(params, request, row_begin, min(row_begin + kTileQ, num_rows));

  const int first_tile = keys.begin / kKvTile;
  const int num_tiles = max(0, (keys.end + kKvTile - 1) / kKvTile - first_tile);
  const int share = params.num_splits.quotient(num_tiles);
  const int longer_shares = num_tiles - share * num_splits;
  const int begin_tile = first_tile + split * share + min(split, longer_shares);
  const int end_tile = begin_tile + share + (split < longer_shares ? 1 : 0);
  const int kv_begin = begin_tile * kKvTile;
  const int kv_end = min(keys.end, end_tile * kKvTile);

  const int slot = (q_tile * num_kv_heads + kv_head) * num_splits + split;
  return {0, 0, kv_head, row_begin, kv_begin, kv_end, num_splits > 1 ? slot * kTileQ : -1, 0};
}

}  // namespace ridgeline
