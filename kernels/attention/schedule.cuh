// The work list of a batch, made on the GPU by one CTA of 1,024 threads.
//
// Items are query tiles (batch_invariant: and parts of them), numbered by request; each stands for
// as many units as there are KV heads, all of one cost. The costs of all units, end to end, are cut
// into num_ctas equal ranges, one a CTA. A cut within a unit falls between two KV tiles, or moves
// to the unit's nearer end when less than min_kv_tiles would come off. Then
//   record r of CTA c is unit(cut c) + r, from cut c's key in the first to cut c + 1's in the last,
// so the place of every record follows from the number of cuts before it, and all are written at
// once. Parts of one unit have consecutive slots of partial results, in the order of their keys.
// All lengths are clamped, so that bad contents give wrong work but none out of bounds. All SMs.
#pragma once

#include "attention/batch_params.h"
#include "attention/work_item.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

inline constexpr int kMaxLength = 1 << 30;
inline constexpr int kStartsInSmem = 2048;

struct ScheduledRequest {
  int q_begin;
  Request lengths;
  int kv_origin;
};

__device__ __forceinline__ int clamped(int value, int low, int high) {
  return max(low, min(value, high));
}

__device__ __forceinline__ ScheduledRequest scheduled_request(const ScheduleParams& params,
                                                              int request) {
  ScheduledRequest result = {request, {1, 0}, request};
  if (params.qo_indptr != nullptr) {
    result.q_begin = clamped(params.qo_indptr[request], 0, params.num_tokens);
    const int end = clamped(params.qo_indptr[request + 1], result.q_begin, params.num_tokens);
    result.lengths.qo_len = min(end - result.q_begin, params.max_q_len);
  }
  int64 kv_len = 0;
  if (params.form == KvForm::kPadded) {
    kv_len = params.kv_lens[request];
  } else {
    result.kv_origin = clamped(params.kv_indptr[request], 0, kMaxLength);
    const int64 count = int64(params.kv_indptr[request + 1]) - result.kv_origin;
    if (params.form == KvForm::kRagged) {
      kv_len = count;
    } else if (params.form == KvForm::kPagedByLength) {
      kv_len = params.kv_lens[request];
    } else if (count > 0) {
      const int last = clamped(params.kv_lens[request], 0, params.page_size);
      kv_len = (count - 1) * params.page_size + last;
    }
  }
  result.lengths.kv_len = kv_len < 0 ? 0 : kv_len > kMaxLength ? kMaxLength : int(kv_len);
  return result;
}

// A query tile's keys as a range of KV tiles.
struct TileSpan {
  int q_row_begin;
  int first_kv_tile;
  int num_kv_tiles;
  int end_key;
};

__device__ __forceinline__ int height_of(const ScheduleParams& params, int num_rows) {
  return params.num_heights == 1 || num_rows <= params.heights[0].tile_q ? 0 : 1;
}

__device__ __forceinline__ TileSpan tile_span(const ScheduleParams& params, const Request& request,
                                              const TileHeight& height, int q_tile) {
  const int num_rows = request.qo_len * params.group_size;
  const int row_begin = q_tile * height.tile_q;
  const int last_row = min(row_begin + height.tile_q, num_rows) - 1;
  const bool causal = params.causal != 0;
  const int begin =
      masked_keys(request, row_begin / params.group_size, causal, params.window_left).begin;
  const int end =
      masked_keys(request, last_row / params.group_size, causal, params.window_left).end;
  const int first = begin / height.kv_tile;
  const int num_tiles = max(0, (end + height.kv_tile - 1) / height.kv_tile - first);
  return {row_begin, first, num_tiles, end};
}

// Parts that batch_invariant cuts a query tile into.
__device__ __forceinline__ int invariant_pieces(const ScheduleParams& params, int height_idx,
                                                int num_kv_tiles) {
  if (!params.invariant || params.heights[height_idx].tile_q != 16) return 1;
  return clamped(num_kv_tiles / kInvariantTiles, 1, kInvariantPieces);
}

__device__ __forceinline__ int items_of(const ScheduleParams& params, int request) {
  const Request lengths = scheduled_request(params, request).lengths;
  const int num_rows = lengths.qo_len * params.group_size;
  if (num_rows == 0) return 0;
  const int height_idx = height_of(params, num_rows);
  const TileHeight& height = params.heights[height_idx];
  const int num_q_tiles = (num_rows + height.tile_q - 1) / height.tile_q;
  if (num_q_tiles > 1) return num_q_tiles;
  return invariant_pieces(params, height_idx, tile_span(params, lengths, height, 0).num_kv_tiles);
}

// Sums over the block of what the threads before this one hold; `total` gets the sum of all.
template <typename T>
__device__ __forceinline__ T exclusive_sum(T value, T* warp_sums, T& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kScheduleThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + sum - value;
}

// The last i in [0, count) with starts[i] <= value, given starts[0] <= value.
template <typename T>
__device__ __forceinline__ int last_at_most(const T* starts, int count, T value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Item {
  int request;
  int height_idx;
  int num_rows;  // of the request
  int num_pieces, piece;
  ScheduledRequest of;
  TileSpan span;  // of the item's own keys
};

__device__ __forceinline__ Item item_at(const ScheduleParams& params, const int* item_starts,
                                        int index) {
  Item item;
  item.request = last_at_most(item_starts, params.batch_size, index);
  item.of = scheduled_request(params, item.request);
  const int place = index - item_starts[item.request];
  item.num_rows = item.of.lengths.qo_len * params.group_size;
  item.height_idx = height_of(params, item.num_rows);
  const TileHeight& height = params.heights[item.height_idx];
  const bool one_tile = item.num_rows <= height.tile_q;
  item.span = tile_span(params, item.of.lengths, height, one_tile ? 0 : place);
  item.num_pieces =
      one_tile ? invariant_pieces(params, item.height_idx, item.span.num_kv_tiles) : 1;
  item.piece = item.num_pieces > 1 ? place : 0;
  if (item.num_pieces > 1) {
    const int num_tiles = item.span.num_kv_tiles;
    const int begin = num_tiles * item.piece / item.num_pieces;
    const int end = num_tiles * (item.piece + 1) / item.num_pieces;
    item.span.end_key = min(item.span.end_key, (item.span.first_kv_tile + end) * height.kv_tile);
    item.span.first_kv_tile += begin;
    item.span.num_kv_tiles = end - begin;
  }
  return item;
}

__device__ __forceinline__ int64 cost_of(const ScheduleParams& params, const Item& item) {
  const TileHeight& height = params.heights[item.height_idx];
  return int64(item.span.num_kv_tiles) * height.step_cost + height.tile_cost;
}

// A place in the line of units: KV tile kv_tile of a unit.
struct Cut {
  int unit;
  int kv_tile;
};

// Cut c of num_ctas + 1.
__device__ __forceinline__ Cut find_cut(const ScheduleParams& params, const int* item_starts,
                                        const int64* costs, int num_items, int c) {
  const int num_heads = params.num_kv_heads.divisor;
  if (c == params.num_ctas || num_items == 0) return {num_items * num_heads, 0};
  const int64 total = costs[num_items] * num_heads;
  const int64 place = total * c / params.num_ctas;
  const int index = last_at_most(costs, num_items, place / num_heads);
  const int64 cost = costs[index + 1] - costs[index];
  const int64 rest = place - costs[index] * num_heads;
  const int head = int(rest / cost);
  const int64 within = rest - head * cost;

  const Item item = item_at(params, item_starts, index);
  const TileHeight& height = params.heights[item.height_idx];
  const int num_tiles = item.span.num_kv_tiles;
  const Cut begin = {index * num_heads + head, 0};
  const Cut end = {begin.unit + 1, 0};
  if (params.invariant) return 2 * within < cost ? begin : end;
  const int before = int(within * num_tiles / cost);
  const int after = num_tiles - before;
  const int64 share = total / params.num_ctas / height.step_cost;
  const int least = max(height.min_kv_tiles, int(min(share / 32, int64(kMaxLength))));
  if (before == 0 || (before < least && before <= after)) return begin;
  if (after < least) return end;
  return {begin.unit, before};
}

__global__ void __launch_bounds__(kScheduleThreads, 1)
    schedule(const __grid_constant__ ScheduleParams params) {
  __shared__ int64 warp_sums[kScheduleThreads / 32];
  __shared__ int few_starts[kStartsInSmem + 1];
  __shared__ int64 few_costs[kStartsInSmem + 1];
  __shared__ Cut cuts[kMaxBatchCtas + 1];
  __shared__ int first_records[kMaxBatchCtas + 1];
  __shared__ int cuts_before[kMaxBatchCtas + 1];       // inner cuts up to this one, distinct ones
  __shared__ int cut_tiles_before[kMaxBatchCtas + 1];  // units that they cut
  int* item_starts =
      params.batch_size <= kStartsInSmem ? few_starts : params.list + params.item_starts_at;
  int64* costs = params.max_items <= kStartsInSmem
                     ? few_costs
                     : reinterpret_cast<int64*>(params.list + params.costs_at);
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  CutTile* cut_tiles = reinterpret_cast<CutTile*>(params.list + kCutTilesAt);
  const int thread = threadIdx.x;
  const int num_heads = params.num_kv_heads.divisor;
  pdl_wait();
  pdl_launch_dependents();

  // Where each request's items begin.
  int64 num_items = 0;
  for (int base = 0; base < params.batch_size; base += kScheduleThreads) {
    const int request = base + thread;
    const int64 count = request < params.batch_size ? items_of(params, request) : 0;
    int64 sum;
    const int64 before = num_items + exclusive_sum(count, warp_sums, sum);
    if (request < params.batch_size) {
      item_starts[request] = int(min(before, int64(params.max_items)));
    }
    num_items = min(num_items + sum, int64(params.max_items));
  }
  if (thread == 0) item_starts[params.batch_size] = int(num_items);
  __syncthreads();

  // Costs of one KV head, summed over the items before.
  int64 cost_before = 0;
  for (int base = 0; base < num_items; base += kScheduleThreads) {
    const int index = base + thread;
    const int64 cost = index < num_items ? cost_of(params, item_at(params, item_starts, index)) : 0;
    int64 sum;
    const int64 before = cost_before + exclusive_sum(cost, warp_sums, sum);
    if (index < num_items) costs[index] = before;
    cost_before += sum;
  }
  if (thread == 0) costs[num_items] = cost_before;
  __syncthreads();

  // Cuts, and how many there are before each.
  if (thread < params.num_ctas) {
    cuts[thread] = find_cut(params, item_starts, costs, int(num_items), thread);
  }
  if (thread == 0) cuts[params.num_ctas] = {int(num_items) * num_heads, 0};
  __syncthreads();
  int is_inner = 0;
  int is_first = 0;
  if (thread < params.num_ctas && cuts[thread].kv_tile > 0) {
    const Cut cut = cuts[thread];
    const Cut last = thread > 0 ? cuts[thread - 1] : Cut{-1, 0};
    is_inner = last.unit != cut.unit || last.kv_tile != cut.kv_tile;
    is_first = last.unit != cut.unit || last.kv_tile == 0;
  }
  int num_cuts;
  const int before =
      exclusive_sum(is_inner + is_first * 65536, reinterpret_cast<int*>(warp_sums), num_cuts);
  if (thread <= params.num_ctas && thread < kMaxBatchCtas) {
    cuts_before[thread] = before % 65536 + is_inner;
    cut_tiles_before[thread] = before / 65536 + is_first;
    first_records[thread] = cuts[thread].unit + cuts_before[thread];
  }
  if (thread == 0) {
    cuts_before[params.num_ctas] = num_cuts % 65536;
    cut_tiles_before[params.num_ctas] = num_cuts / 65536;
    first_records[params.num_ctas] = cuts[params.num_ctas].unit + num_cuts % 65536;
    ListHeader header = {};
    header.tag = params.tag;
    header.num_ctas = params.num_ctas;
    header.num_records = first_records[params.num_ctas];
    header.num_cut_tiles = params.invariant ? params.batch_size * num_heads : num_cuts / 65536;
    header.num_tokens = params.qo_indptr == nullptr
                            ? params.batch_size
                            : clamped(params.qo_indptr[params.batch_size], 0, params.num_tokens);
    *reinterpret_cast<ListHeader*>(params.list) = header;
  }
  __syncthreads();
  for (int c = thread; c <= params.num_ctas; c += kScheduleThreads) {
    params.list[kFirstRecordsAt + c] = first_records[c];
  }

  // The records.
  const int num_records = first_records[params.num_ctas];
  for (int r = thread; r < num_records; r += kScheduleThreads) {
    const int c = last_at_most(first_records, params.num_ctas, r);
    const int unit = cuts[c].unit + r - first_records[c];
    const int index = params.num_kv_heads.quotient(unit);
    const Item item = item_at(params, item_starts, index);
    const TileHeight& height = params.heights[item.height_idx];
    const int begin = r == first_records[c] ? cuts[c].kv_tile : 0;
    const bool ends_inside = unit == cuts[c + 1].unit;
    const int end = ends_inside ? cuts[c + 1].kv_tile : item.span.num_kv_tiles;
    int slot = -1;
    if (params.invariant) {
      if (item.num_pieces > 1) slot = unit;
    } else if (begin > 0) {
      slot = cuts_before[c] + cut_tiles_before[c] - 1;
    } else if (ends_inside) {
      slot = cuts_before[c + 1] + cut_tiles_before[c + 1] - 2;
    }
    WorkRecord record = {};
    record.segment_height = item.height_idx;
    record.request = item.request;
    record.kv_head = unit - index * num_heads;
    record.q_row_begin = item.span.q_row_begin;
    record.q_begin = item.of.q_begin;
    record.qo_len = item.of.lengths.qo_len;
    record.kv_origin = item.of.kv_origin;
    record.kv_len = item.of.lengths.kv_len;
    record.kv_begin = (item.span.first_kv_tile + begin) * height.kv_tile;
    record.kv_end = min(item.span.end_key, (item.span.first_kv_tile + end) * height.kv_tile);
    record.partial_row = slot < 0 ? -1 : slot * params.slot_rows;
    records[r] = record;
  }

  // The cut tiles.
  if (params.invariant) {
    for (int i = thread; i < params.batch_size * num_heads; i += kScheduleThreads) {
      const int request = params.num_kv_heads.quotient(i);
      const int head = i - request * num_heads;
      CutTile tile = {};
      const int first = item_starts[request];
      if (item_starts[request + 1] - first > 1) {
        const Item item = item_at(params, item_starts, first);
        tile = {item.of.q_begin,
                0,
                head,
                item.num_rows,
                (first * num_heads + head) * params.slot_rows,
                item.num_pieces > 1 ? item.num_pieces : 0,
                num_heads * params.slot_rows,
                0};
      }
      cut_tiles[i] = tile;
    }
  } else if (is_first) {
    const int unit = cuts[thread].unit;
    int last = thread;
    while (last + 1 < params.num_ctas && cuts[last + 1].unit == unit) ++last;
    const Item item = item_at(params, item_starts, params.num_kv_heads.quotient(unit));
    const int num_rows =
        min(params.heights[item.height_idx].tile_q, item.num_rows - item.span.q_row_begin);
    const int slot = cuts_before[thread] + cut_tiles_before[thread] - 2;
    cut_tiles[cut_tiles_before[thread] - 1] = {item.of.q_begin,
                                               item.span.q_row_begin,
                                               int(params.num_kv_heads.remainder(unit)),
                                               num_rows,
                                               slot * params.slot_rows,
                                               cuts_before[last] - cuts_before[thread] + 2,
                                               params.slot_rows,
                                               0};
  }
}

}  // namespace ridgeline
