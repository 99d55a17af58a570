// The work list of a batch, made on the GPU by a few CTAs of 512 threads. Each finds all cuts; then
// they share the writing of the records.
//
// Items are query tiles (batch_invariant: and parts of them), numbered by request; each stands for
// as many units as there are KV heads, all of one cost. The costs of all units, end to end, are cut
// into num_ctas equal ranges, one a CTA. A cut within a unit falls between two KV tiles, or moves
// to the unit's nearer end when less than min_kv_tiles would come off. Then
//   record r of CTA c is unit(cut c) + r, from cut c's key in the first to cut c + 1's in the last,
// so the place of every record follows from the number of cuts before it, and all are written at
// once. Parts of one unit have consecutive slots of partial results, in the order of their keys.
// All lengths are clamped, so that bad contents give wrong work but none out of bounds. All SMs.
//
// Each step of the way has one place in the kernel, and what it found is kept, in shared memory for
// up to kKeptInSmem requests and items; beyond that in the list, where all CTAs write the same.
// Why 512 threads: 32 warps took 9 us, mostly for instructions of warps that had nothing to do.
#pragma once

#include "attention/batch_params.h"
#include "attention/work_item.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

inline constexpr int kMaxLength = 1 << 30;
inline constexpr int kKeptInSmem = 512;

struct alignas(16) ScheduledRequest {
  int q_begin;
  int kv_origin;
  Request lengths;
};
static_assert(sizeof(ScheduledRequest) == kRequestWords * 4, "whole words");

// A query tile, or a part of one, and its own keys.
struct alignas(16) ScheduledItem {
  int request;
  int q_row_begin;
  int first_kv_tile;
  int end_key;
};
static_assert(sizeof(ScheduledItem) == kItemWords * 4, "whole words");

__device__ __forceinline__ int clamped(int value, int low, int high) {
  return max(low, min(value, high));
}

__device__ __forceinline__ ScheduledRequest scheduled_request(const ScheduleParams& params,
                                                              int request) {
  // All loads before anything waits for one.
  const bool ragged_queries = params.qo_indptr != nullptr;
  const int q_begin = ragged_queries ? params.qo_indptr[request] : request;
  const int q_end = ragged_queries ? params.qo_indptr[request + 1] : request + 1;
  const int kv_begin = params.kv_indptr != nullptr ? params.kv_indptr[request] : request;
  const int kv_end = params.kv_indptr != nullptr ? params.kv_indptr[request + 1] : 0;
  const int given = params.kv_lens != nullptr ? params.kv_lens[request] : 0;

  ScheduledRequest result;
  result.q_begin = clamped(q_begin, 0, params.num_tokens);
  const int qo_len = clamped(q_end, result.q_begin, params.num_tokens) - result.q_begin;
  result.lengths.qo_len = min(qo_len, params.max_q_len);
  result.kv_origin = clamped(kv_begin, 0, kMaxLength);
  const int64 count = int64(kv_end) - result.kv_origin;
  int64 kv_len = given;
  if (params.form == KvForm::kRagged) kv_len = count;
  if (params.form == KvForm::kPagedByLastPage) {
    kv_len = count > 0 ? (count - 1) * params.page_size + clamped(given, 0, params.page_size) : 0;
  }
  result.lengths.kv_len = kv_len < 0 ? 0 : kv_len > kMaxLength ? kMaxLength : int(kv_len);
  return result;
}

__device__ __forceinline__ int num_rows_of(const ScheduleParams& params, const Request& request) {
  return request.qo_len * int(params.group_size.divisor);
}

__device__ __forceinline__ int height_of(const ScheduleParams& params, int num_rows) {
  return params.num_heights == 1 || num_rows <= int(params.heights[0].tile_q.divisor) ? 0 : 1;
}

__device__ __forceinline__ int kv_tiles_up_to(const TileHeight& height, int key) {
  return int(height.kv_tile.quotient(key + height.kv_tile.divisor - 1));
}

// KV tiles of an item.
__device__ __forceinline__ int num_kv_tiles(const TileHeight& height, const ScheduledItem& item) {
  return max(0, kv_tiles_up_to(height, item.end_key) - item.first_kv_tile);
}

// Of one KV head.
__device__ __forceinline__ int64 cost_of(const TileHeight& height, int num_tiles) {
  return int64(num_tiles) * height.step_cost + height.tile_cost;
}

// A query tile of a request with all its keys.
__device__ __forceinline__ ScheduledItem whole_tile(const ScheduleParams& params,
                                                    const ScheduledRequest& of,
                                                    const TileHeight& height, int request,
                                                    int q_tile) {
  const int row_begin = q_tile * int(height.tile_q.divisor);
  const int last_row =
      min(row_begin + int(height.tile_q.divisor), num_rows_of(params, of.lengths)) - 1;
  const int first_query = params.group_size.quotient(row_begin);
  const int last_query = params.group_size.quotient(last_row);
  const bool causal = params.causal != 0;
  const int begin = masked_keys(of.lengths, first_query, causal, params.window_left).begin;
  const int end = masked_keys(of.lengths, last_query, causal, params.window_left).end;
  return {request, row_begin, int(height.kv_tile.quotient(begin)), max(end, 0)};
}

// Parts that batch_invariant cuts a request of one query tile into.
__device__ __forceinline__ int invariant_pieces(const TileHeight& height, int num_tiles) {
  return height.tile_q.divisor != 16 ? 1
                                     : clamped(num_tiles / kInvariantTiles, 1, kInvariantPieces);
}

// Sums over the block of what the threads before this one hold; `total` gets the sum of all.
__device__ __forceinline__ int64 exclusive_sum(int64 value, int64* warp_sums, int64& total) {
  constexpr int kWarps = kScheduleThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int64 sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64 other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int64 of_warps = lane < kWarps ? warp_sums[lane] : 0;
#pragma unroll
  for (int distance = 1; distance < kWarps; distance *= 2) {
    const int64 other = __shfl_up_sync(0xffffffffu, of_warps, distance);
    if (lane >= distance) of_warps += other;
  }
  total = __shfl_sync(0xffffffffu, of_warps, kWarps - 1);
  const int64 before = __shfl_sync(0xffffffffu, of_warps, max(warp - 1, 0));
  return sum - value + (warp == 0 ? 0 : before);
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

// A place in the line of units: KV tile kv_tile of a unit.
struct Cut {
  int unit;
  int kv_tile;
};

// What earlier steps found.
struct Found {
  ScheduledRequest* requests;  // [batch_size]
  int* item_starts;            // [batch_size + 1]
  ScheduledItem* items;        // [num_items]
  int64* costs;                // [num_items + 1], of all KV heads, summed over the items before
};

// Where the line of costs is cut for the c-th time.
__device__ __forceinline__ Cut find_cut(const ScheduleParams& params, const Found& found,
                                        int num_items, int c) {
  const int num_heads = params.num_kv_heads.divisor;
  const int64 total = found.costs[num_items];
  // Why shifted: total * c must fit 31 bits, and a cut may be off by a millionth of the work.
  const int shift = max(0, 43 - __clzll(total));
  const int64 place = int64(params.cta_count.quotient(uint32(total >> shift) * c)) << shift;
  const int index = last_at_most(found.costs, num_items, place);
  const int64 rest = place - found.costs[index];
  const ScheduledItem item = found.items[index];
  const int num_rows = num_rows_of(params, found.requests[item.request].lengths);
  const TileHeight& height = params.heights[height_of(params, num_rows)];
  const int num_tiles = num_kv_tiles(height, item);
  const int64 cost = cost_of(height, num_tiles);
  // Why two: a division of 64 bits takes ten times as long.
  const int head = total < kMaxLength ? int(uint32(rest) / uint32(cost)) : int(rest / cost);
  const int64 within = rest - head * cost;
  const Cut begin = {index * num_heads + head, 0};
  const Cut end = {begin.unit + 1, 0};
  if (params.invariant) return 2 * within < cost ? begin : end;
  const int keys_cost = int(min(max(within - height.tile_cost, 0ll), int64(kMaxLength)));
  const int before = min(int(height.steps_of_cost.quotient(keys_cost)), num_tiles);
  const int after = num_tiles - before;
  const float share = float(total) / float(params.num_ctas * 32 * height.step_cost);
  const int least = max(height.min_kv_tiles, int(fminf(share, 1e9f)));
  if (before == 0 || (before < least && before <= after)) return begin;
  if (after < least) return end;
  return {begin.unit, before};
}

__global__ void __launch_bounds__(kScheduleThreads, 1)
    schedule(const __grid_constant__ ScheduleParams params) {
  __shared__ int64 warp_sums[kScheduleThreads / 32];
  __shared__ ScheduledRequest few_requests[kKeptInSmem];
  __shared__ int few_starts[kKeptInSmem + 1];
  __shared__ ScheduledItem few_items[kKeptInSmem];
  __shared__ int64 few_costs[kKeptInSmem + 1];
  __shared__ Cut cuts[kMaxBatchCtas + 1];
  __shared__ int first_records[kMaxBatchCtas + 1];
  __shared__ int cut_tiles_before[kMaxBatchCtas + 1];  // units that cuts up to this one go through
  Found found = {few_requests, few_starts, few_items, few_costs};
  if (params.batch_size > kKeptInSmem) {
    found.requests = reinterpret_cast<ScheduledRequest*>(params.list + params.requests_at);
    found.item_starts = params.list + params.item_starts_at;
  }
  if (params.max_items > kKeptInSmem) {
    found.items = reinterpret_cast<ScheduledItem*>(params.list + params.items_at);
    found.costs = reinterpret_cast<int64*>(params.list + params.costs_at);
  }
  const int thread = threadIdx.x;
  const int num_heads = params.num_kv_heads.divisor;
  pdl_wait();
  pdl_launch_dependents();

  // The requests, and where each one's items begin.
  int64 items_before = 0;
  bool one_each = params.batch_size <= kScheduleThreads;
#pragma unroll 1
  for (int base = 0; base < params.batch_size; base += kScheduleThreads) {
    const int request = base + thread;
    int64 count = request < params.batch_size ? 0 : 1;
    if (request < params.batch_size) {
      const ScheduledRequest of = scheduled_request(params, request);
      found.requests[request] = of;
      const int num_rows = num_rows_of(params, of.lengths);
      const TileHeight& height = params.heights[height_of(params, num_rows)];
      count = height.tile_q.quotient(num_rows + height.tile_q.divisor - 1);
      if (params.invariant && count == 1) {
        const ScheduledItem tile = whole_tile(params, of, height, request, 0);
        count = invariant_pieces(height, num_kv_tiles(height, tile));
      }
    }
    // A batch of decodes needs no sums.
    if (one_each) one_each = __syncthreads_and(count == 1);
    if (one_each) {
      if (request < params.batch_size) found.item_starts[request] = request;
      items_before = params.batch_size;
      break;
    }
    if (request >= params.batch_size) count = 0;
    int64 sum;
    const int64 before = items_before + exclusive_sum(count, warp_sums, sum);
    if (request < params.batch_size) {
      found.item_starts[request] = int(min(before, int64(params.max_items)));
    }
    items_before = min(items_before + sum, int64(params.max_items));
  }
  const int num_items = int(items_before);
  if (thread == 0) found.item_starts[params.batch_size] = num_items;
  __syncthreads();

  // The items and their costs.
  int64 cost_before = 0;
#pragma unroll 1
  for (int base = 0; base < num_items; base += kScheduleThreads) {
    const int index = base + thread;
    int64 cost = 0;
    if (index < num_items) {
      const int request =
          one_each ? index : last_at_most(found.item_starts, params.batch_size, index);
      const ScheduledRequest of = found.requests[request];
      const int num_rows = num_rows_of(params, of.lengths);
      const TileHeight& height = params.heights[height_of(params, num_rows)];
      const int place = index - found.item_starts[request];
      const bool one_tile = num_rows <= int(height.tile_q.divisor);
      ScheduledItem item = whole_tile(params, of, height, request, one_tile ? 0 : place);
      int num_tiles = num_kv_tiles(height, item);
      if (params.invariant && one_tile) {
        const int num_pieces = invariant_pieces(height, num_tiles);
        const int begin = num_tiles * place / num_pieces;
        const int end = num_tiles * (place + 1) / num_pieces;
        const int kv_tile = height.kv_tile.divisor;
        item.end_key = min(item.end_key, (item.first_kv_tile + end) * kv_tile);
        item.first_kv_tile += begin;
        num_tiles = end - begin;
      }
      found.items[index] = item;
      cost = cost_of(height, num_tiles) * num_heads;
    }
    int64 sum;
    const int64 before = cost_before + exclusive_sum(cost, warp_sums, sum);
    if (index < num_items) found.costs[index] = before;
    cost_before += sum;
  }
  if (thread == 0) found.costs[num_items] = cost_before;
  __syncthreads();

  // Cuts, and how many there are before each: inner ones, and in the upper half the units they cut.
  for (int c = thread; c <= params.num_ctas; c += kScheduleThreads) {
    const bool inside = c < params.num_ctas && num_items > 0;
    cuts[c] = inside ? find_cut(params, found, num_items, c) : Cut{num_items * num_heads, 0};
  }
  __syncthreads();
  int64 cuts_before = 0;
#pragma unroll 1
  for (int base = 0; base < params.num_ctas; base += kScheduleThreads) {
    const int c = base + thread;
    int64 count = 0;
    if (c < params.num_ctas && cuts[c].kv_tile > 0) {
      const Cut last = c > 0 ? cuts[c - 1] : Cut{-1, 0};
      const bool is_inner = last.unit != cuts[c].unit || last.kv_tile != cuts[c].kv_tile;
      const bool is_first = last.unit != cuts[c].unit || last.kv_tile == 0;
      count = is_inner + (is_first ? 65536 : 0);
    }
    int64 sum;
    const int before = int(cuts_before + exclusive_sum(count, warp_sums, sum) + count);
    if (c < params.num_ctas) {
      first_records[c] = cuts[c].unit + before % 65536;
      cut_tiles_before[c] = before / 65536;
      if (blockIdx.x == 0) params.list[kFirstRecordsAt + c] = first_records[c];
    }
    cuts_before += sum;
  }
  const int num_cut_tiles = int(cuts_before) / 65536;
  const int num_records = num_items * num_heads + int(cuts_before) % 65536;
  if (thread == 0) {
    first_records[params.num_ctas] = num_records;
    cut_tiles_before[params.num_ctas] = num_cut_tiles;
  }
  if (thread == 0 && blockIdx.x == 0) {
    params.list[kFirstRecordsAt + params.num_ctas] = num_records;
    ListHeader header = {};
    header.tag = params.tag;
    header.num_ctas = params.num_ctas;
    header.num_records = num_records;
    header.num_cut_tiles = params.invariant ? params.batch_size * num_heads : num_cut_tiles;
    header.num_tokens = params.qo_indptr == nullptr
                            ? params.batch_size
                            : clamped(params.qo_indptr[params.batch_size], 0, params.num_tokens);
    *reinterpret_cast<ListHeader*>(params.list) = header;
  }
  __syncthreads();

  // The records, and with its first part each tile that was cut.
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  CutTile* cut_tiles = reinterpret_cast<CutTile*>(params.list + kCutTilesAt);
#pragma unroll 1
  for (int r = blockIdx.x * kScheduleThreads + thread; r < num_records;
       r += gridDim.x * kScheduleThreads) {
    const int c = last_at_most(first_records, params.num_ctas, r);
    const Cut from = cuts[c], to = cuts[c + 1];
    const int unit = from.unit + r - first_records[c];
    const int index = params.num_kv_heads.quotient(unit);
    const ScheduledItem item = found.items[index];
    const ScheduledRequest of = found.requests[item.request];
    const int num_rows = num_rows_of(params, of.lengths);
    const int height_idx = height_of(params, num_rows);
    const TileHeight& height = params.heights[height_idx];
    const int kv_tile = height.kv_tile.divisor;
    const int begin = r == first_records[c] ? from.kv_tile : 0;
    const bool ends_inside = unit == to.unit;
    WorkRecord record = {};
    record.segment_height = height_idx;
    record.request = item.request;
    record.kv_head = unit - index * num_heads;
    record.q_row_begin = item.q_row_begin;
    record.q_begin = of.q_begin;
    record.qo_len = of.lengths.qo_len;
    record.kv_origin = of.kv_origin;
    record.kv_len = of.lengths.kv_len;
    record.kv_begin = (item.first_kv_tile + begin) * kv_tile;
    record.kv_end =
        ends_inside ? min(item.end_key, (item.first_kv_tile + to.kv_tile) * kv_tile) : item.end_key;
    record.kv_end = max(record.kv_end, record.kv_begin);
    record.partial_row = -1;
    if (params.invariant) {
      const int first = found.item_starts[item.request];
      const int num_pieces = found.item_starts[item.request + 1] - first;
      const bool in_pieces = num_rows <= int(height.tile_q.divisor) && num_pieces > 1;
      if (in_pieces) record.partial_row = unit * params.slot_rows;
      if (index == first) {
        cut_tiles[item.request * num_heads + record.kv_head] = {of.q_begin,
                                                                0,
                                                                record.kv_head,
                                                                num_rows,
                                                                unit * params.slot_rows,
                                                                in_pieces ? num_pieces : 0,
                                                                num_heads * params.slot_rows,
                                                                0};
      }
    } else if (begin > 0) {
      const int inner_cuts = first_records[c] - from.unit;
      record.partial_row = (inner_cuts + cut_tiles_before[c] - 1) * params.slot_rows;
    } else if (ends_inside) {
      const int inner_cuts = first_records[c + 1] - to.unit;
      const int tile = cut_tiles_before[c + 1] - 1;
      int last = c + 1;
      while (last + 1 < params.num_ctas && cuts[last + 1].unit == unit) ++last;
      record.partial_row = (inner_cuts + tile - 1) * params.slot_rows;
      cut_tiles[tile] = {
          of.q_begin,         item.q_row_begin,
          record.kv_head,     min(int(height.tile_q.divisor), num_rows - item.q_row_begin),
          record.partial_row, first_records[last] - unit - inner_cuts + 2,
          params.slot_rows,   0};
    }
    records[r] = record;
  }

  // Requests that have no item, so that no record could say that they have no parts.
  if (params.invariant) {
#pragma unroll 1
    for (int i = blockIdx.x * kScheduleThreads + thread; i < params.batch_size * num_heads;
         i += gridDim.x * kScheduleThreads) {
      const int request = params.num_kv_heads.quotient(i);
      if (found.item_starts[request + 1] == found.item_starts[request]) cut_tiles[i] = {};
    }
  }
}

}  // namespace ridgeline
