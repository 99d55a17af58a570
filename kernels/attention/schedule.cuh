// The work list of a batch, made on the GPU by a few CTAs. Each finds all cuts; then they share the
// writing of the records.
//
// Items are query tiles (batch_invariant: and parts of them), numbered by request; each stands for
// as many units as there are teams' worths of KV heads, all of one cost.
//
// Shared out: the costs of all units, end to end, are cut into num_teams equal ranges. A cut within
// a unit falls between two KV tiles, or moves to the unit's nearer end when less than min_kv_tiles
// would come off. Then
//   record r of team c is unit(cut c) + r, from cut c's key in the first to cut c + 1's in the
//   last,
// so the place of every record follows from the number of cuts before it, and all are written at
// once. Parts of one unit have consecutive slots of partial results, in the order of their keys.
//
// By tile, where no tile is too dear: whole items in four classes of cost, dearest first, each
// twice as dear as the next. Nothing is cut, and what SMs differ in speed evens out.
//
// All lengths are clamped, so that bad contents give wrong work but none out of bounds. All SMs.
//
// Each step of the way has one place in the kernel, and what it found is kept, in shared memory for
// up to kKeptInSmem requests and items; beyond that in the list, where all CTAs write the same.
#pragma once

#include "attention/batch_params.h"
#include "attention/schedule_items.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

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
  int64* costs;                // [num_items + 1], of all bundles, summed over the items before
};

// Where the line of costs is cut for the c-th time.
template <bool kTall, int kSegments>
__device__ __forceinline__ Cut find_cut(const ScheduleParams<kSegments>& params, const Found& found,
                                        int num_items, int c) {
  const int num_bundles = params.num_bundles.divisor;
  const int64 total = found.costs[num_items];
  // Why shifted: total * c must fit 31 bits, and a cut may be off by a millionth of the work.
  const int shift = max(0, 43 - __clzll(total));
  const int64 place = int64(params.team_count.quotient(uint32(total >> shift) * c)) << shift;
  const int index = last_at_most(0, num_items, place, [&](int i) { return found.costs[i]; });
  const int64 rest = place - found.costs[index];
  const ScheduledItem item = found.items[index];
  const ScheduleSegment& segment = params.segments[segment_of(params, item.request)];
  const int num_rows = num_rows_of(params, found.requests[item.request].lengths);
  const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
  const int num_tiles = num_kv_tiles(height, item);
  const int64 cost = cost_of(height, num_tiles);
  // Why two: a division of 64 bits takes ten times as long.
  const int bundle = total < kMaxLength ? int(uint32(rest) / uint32(cost)) : int(rest / cost);
  const int64 within = rest - bundle * cost;
  const Cut begin = {index * num_bundles + bundle, 0};
  const Cut end = {begin.unit + 1, 0};
  if (params.invariant) return 2 * within < cost ? begin : end;
  const int keys_cost = int(min(max(within - height.tile_cost, 0ll), int64(kMaxLength)));
  const int before = min(int(height.steps_of_cost.quotient(keys_cost)), num_tiles);
  const int after = num_tiles - before;
  const float share = __fdividef(float(total), float(params.num_teams * 32 * height.step_cost));
  const int least = max(height.min_kv_tiles, int(fminf(share, 1e9f)));
  if (before == 0 || (before < least && before <= after)) return begin;
  if (after < least) return end;
  return {begin.unit, before};
}

// The fields that every record of an item has.
template <bool kTall, int kSegments>
__device__ __forceinline__ WorkRecord record_of(const ScheduleParams<kSegments>& params,
                                                const Found& found, int index) {
  const ScheduledItem item = found.items[index];
  const ScheduledRequest of = found.requests[item.request];
  const int segment_idx = segment_of(params, item.request);
  const ScheduleSegment& segment = params.segments[segment_idx];
  const int height_idx = height_of<kTall>(segment, num_rows_of(params, of.lengths));
  WorkRecord record = {};
  record.segment_height = segment_idx * 256 + height_idx;
  record.request = item.request - first_request(params, segment_idx);
  record.q_row_begin = item.q_row_begin;
  record.q_begin = of.q_begin;
  record.qo_len = of.lengths.qo_len;
  record.kv_origin = of.kv_origin;
  record.kv_len = of.lengths.kv_len;
  record.kv_begin = item.first_kv_tile * int(segment.heights[height_idx].kv_tile.divisor);
  record.kv_end = max(item.end_key, record.kv_begin);
  record.partial_row = -1;
  return record;
}

// Whether whole items, dearest first, fill the GPU evenly: where none is as dear as a third of a
// CTA's share; or as a whole one, where the items of all fractions of that cost come last, as the
// tiles of causal prompts do, so that their mean is about half of the dearest.
template <int kSegments>
__device__ __forceinline__ bool goes_by_tile(const ScheduleParams<kSegments>& params, int num_items,
                                             int64 total_cost, int64 most_cost) {
  const bool has_cheap_ones = 5 * total_cost <= 3 * most_cost * num_items;
  return num_items <= params.max_tiles && (has_cheap_ones ? 1 : 3) * most_cost * params.num_teams <=
                                              total_cost * params.num_bundles.divisor;
}

// Items by class of cost, the dearest class first, and the last items of a class first: the last
// query tiles of a causal request are the dearest.
template <bool kTall, int kSegments>
__device__ __forceinline__ void write_by_tile(const ScheduleParams<kSegments>& params,
                                              const Found& found, int num_items, int64 most_cost,
                                              int64* warp_sums) {
  constexpr int kThreads = schedule_threads(kTall);
  constexpr int kClasses = 4;
  // Counts of all classes, 16 bits each.
  const auto one_of_class = [&](int index) -> int64 {
    if (index >= num_items) return 0;
    const int64 cost = found.costs[index + 1] - found.costs[index];
    int place = 0;
    while (place < kClasses - 1 && (cost << (place + 1)) <= most_cost) ++place;
    return 1ll << (16 * place);
  };
  int64 of_classes = 0;
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
    int64 sum;
    exclusive_sum<kThreads>(one_of_class(base + threadIdx.x), warp_sums, sum);
    of_classes += sum;
  }
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  int64 before = 0;
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
    const int index = base + threadIdx.x;
    const int64 one = one_of_class(index);
    int64 sum;
    const int64 rank = before + exclusive_sum<kThreads>(one, warp_sums, sum);
    before += sum;
    if (one == 0 || base / kThreads % gridDim.x != blockIdx.x) continue;
    int end = 0;
    int shift = -16;
    do {
      shift += 16;
      end += int(of_classes >> shift) & 0xffff;
    } while (one >> shift != 1);
    records[end - 1 - (int(rank >> shift) & 0xffff)] = record_of<kTall>(params, found, index);
  }
}

// Where nothing is cut and no row is padding, tells the host too.
template <int kSegments>
__device__ __forceinline__ void write_header(const ScheduleParams<kSegments>& params,
                                             const ListHeader& header) {
  *reinterpret_cast<ListHeader*>(params.list) = header;
  if (kSegments == 1 && params.report != nullptr && header.num_cut_tiles == 0 &&
      header.num_tokens == params.segments[0].num_tokens) {
    *params.report = params.report_value;
  }
}

template <bool kTall, int kSegments = 1>
__global__ void __launch_bounds__(schedule_threads(kTall), 1)
    schedule(const __grid_constant__ ScheduleParams<kSegments> params) {
  constexpr int kThreads = schedule_threads(kTall);
  __shared__ int64 warp_sums[kThreads / 32];
  __shared__ ScheduledRequest few_requests[kKeptInSmem];
  __shared__ int few_starts[kKeptInSmem + 1];
  __shared__ ScheduledItem few_items[kKeptInSmem];
  __shared__ int64 few_costs[kKeptInSmem + 1];
  __shared__ int64 warp_mosts[kThreads / 32];
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
  const int num_bundles = params.num_bundles.divisor;
  pdl_wait();
  pdl_launch_dependents();

  // The requests, and where each one's items begin.
  ScheduledRequest own_request;
  int64 items_before = 0;
  bool one_each = params.batch_size <= kThreads;
#pragma unroll 1
  for (int base = 0; base < params.batch_size; base += kThreads) {
    const int request = base + thread;
    int64 count = request < params.batch_size ? 0 : 1;
    if (request < params.batch_size) {
      own_request = scheduled_request(params, request);
      found.requests[request] = own_request;
      const int num_rows = num_rows_of(params, own_request.lengths);
      const ScheduleSegment& segment = params.segments[segment_of(params, request)];
      const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
      count = height.tile_q.quotient(num_rows + height.tile_q.divisor - 1);
      if (params.invariant && count == 1) {
        const ScheduledItem tile = whole_tile(params, own_request, height, request, 0);
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
    const int64 before = items_before + exclusive_sum<kThreads>(count, warp_sums, sum);
    if (request < params.batch_size) {
      found.item_starts[request] = int(min(before, int64(params.max_items)));
    }
    items_before = min(items_before + sum, int64(params.max_items));
  }
  const int num_items = int(items_before);
  if (thread == 0) found.item_starts[params.batch_size] = num_items;
  if (!one_each) __syncthreads();

  // The items and their costs.
  int64 cost_before = 0;
  int64 most_cost = 0;
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
    const int index = base + thread;
    int64 cost = 0;
    if (index < num_items) {
      int request = index, place = 0;
      if (!one_each) {
        request =
            last_at_most(0, params.batch_size, index, [&](int i) { return found.item_starts[i]; });
        own_request = found.requests[request];
        place = index - found.item_starts[request];
      }
      const int num_rows = num_rows_of(params, own_request.lengths);
      const ScheduleSegment& segment = params.segments[segment_of(params, request)];
      const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
      const bool one_tile = num_rows <= int(height.tile_q.divisor);
      ScheduledItem item = whole_tile(params, own_request, height, request, one_tile ? 0 : place);
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
      cost = cost_of(height, num_tiles) * num_bundles;
      most_cost = max(most_cost, cost);
    }
    int64 sum;
    const int64 before = cost_before + exclusive_sum<kThreads>(cost, warp_sums, sum);
    if (index < num_items) found.costs[index] = before;
    cost_before += sum;
  }
  if (thread == 0) found.costs[num_items] = cost_before;
  if (kTall) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      most_cost = max(most_cost, __shfl_xor_sync(0xffffffffu, most_cost, distance));
    }
    if (thread % 32 == 0) warp_mosts[thread / 32] = most_cost;
  }
  __syncthreads();

  ListHeader header = {};
  header.tag = params.tag;
  header.num_tokens = tokens_of<kSegments>(params.segments[0]);
  if constexpr (kSegments > 1) header.num_tokens_b = tokens_of<kSegments>(params.segments[1]);
  if (kTall) {
#pragma unroll
    for (const int64 of_warp : warp_mosts) most_cost = max(most_cost, of_warp);
    if (goes_by_tile(params, num_items, cost_before, most_cost)) {
      header.by_tile = 1;
      header.num_records = num_items;
      if (thread == 0 && blockIdx.x == 0) write_header(params, header);
      write_by_tile<kTall>(params, found, num_items, most_cost, warp_sums);
      return;
    }
  }

  // Cuts, and how many there are before each: inner ones, and in the upper half the units they cut.
  for (int c = thread; c <= params.num_teams; c += kThreads) {
    const bool inside = c < params.num_teams && num_items > 0;
    cuts[c] =
        inside ? find_cut<kTall>(params, found, num_items, c) : Cut{num_items * num_bundles, 0};
  }
  __syncthreads();
  int cuts_before = 0;
#pragma unroll 1
  for (int base = 0; base < params.num_teams; base += kThreads) {
    const int c = base + thread;
    int count = 0;
    if (c < params.num_teams && cuts[c].kv_tile > 0) {
      const Cut last = c > 0 ? cuts[c - 1] : Cut{-1, 0};
      const bool is_inner = last.unit != cuts[c].unit || last.kv_tile != cuts[c].kv_tile;
      const bool is_first = last.unit != cuts[c].unit || last.kv_tile == 0;
      count = is_inner + (is_first ? 65536 : 0);
    }
    int sum;
    const int before = cuts_before + exclusive_sum<kThreads>(count, warp_sums, sum) + count;
    if (c < params.num_teams) {
      first_records[c] = cuts[c].unit + before % 65536;
      cut_tiles_before[c] = before / 65536;
    }
    cuts_before += sum;
  }
  const int num_cut_tiles = cuts_before / 65536;
  header.num_records = num_items * num_bundles + cuts_before % 65536;
  header.num_cut_tiles = params.invariant ? params.batch_size * num_bundles : num_cut_tiles;
  header.most_pieces =
      params.invariant ? kInvariantPieces : cuts_before % 65536 - num_cut_tiles + 2;
  if (thread == 0) {
    first_records[params.num_teams] = header.num_records;
    cut_tiles_before[params.num_teams] = num_cut_tiles;
    if (blockIdx.x == 0) write_header(params, header);
  }
  __syncthreads();

  // The records, and with its first part each tile that was cut.
  const int slot_rows = params.slot_rows * params.team_size;
  TeamShare* shares = reinterpret_cast<TeamShare*>(params.list + kSharesAt);
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  CutTile* cut_tiles = reinterpret_cast<CutTile*>(params.list + kCutTilesAt);
  for (int c = blockIdx.x * kThreads + thread; c < params.num_teams; c += gridDim.x * kThreads) {
    shares[c].begin = first_records[c];
    shares[c].end = first_records[c + 1];
  }
#pragma unroll 1
  for (int r = blockIdx.x * kThreads + thread; r < header.num_records; r += gridDim.x * kThreads) {
    const int c = last_at_most(0, params.num_teams, r, [&](int i) { return first_records[i]; });
    const Cut from = cuts[c], to = cuts[c + 1];
    const int unit = from.unit + r - first_records[c];
    const int index = params.num_bundles.quotient(unit);
    const ScheduledItem item = found.items[index];
    WorkRecord record = record_of<kTall>(params, found, index);
    const int segment_idx = segment_of(params, item.request);
    const TileHeight& height = params.segments[segment_idx].heights[record.segment_height % 256];
    const int num_rows = record.qo_len * int(params.group_size.divisor);
    const int kv_tile = height.kv_tile.divisor;
    const int begin = r == first_records[c] ? from.kv_tile : 0;
    const bool ends_inside = unit == to.unit;
    record.kv_head = (unit - index * num_bundles) * params.team_size;
    record.kv_begin += begin * kv_tile;
    if (ends_inside) {
      record.kv_end = min(item.end_key, (item.first_kv_tile + to.kv_tile) * kv_tile);
    }
    record.kv_end = max(record.kv_end, record.kv_begin);
    if (params.invariant) {
      const int first = found.item_starts[item.request];
      const int num_pieces = found.item_starts[item.request + 1] - first;
      const bool in_pieces = num_rows <= int(height.tile_q.divisor) && num_pieces > 1;
      if (in_pieces) record.partial_row = unit * slot_rows;
      if (index == first) {
        cut_tiles[item.request * num_bundles + unit - index * num_bundles] = {
            record.q_begin,          0,
            record.kv_head,          num_rows,
            unit * slot_rows,        in_pieces ? num_pieces : 0,
            num_bundles * slot_rows, segment_idx};
      }
    } else if (begin > 0) {
      const int inner_cuts = first_records[c] - from.unit;
      record.partial_row = (inner_cuts + cut_tiles_before[c] - 1) * slot_rows;
      record.cut_tile = cut_tiles_before[c] - 1;
    } else if (ends_inside) {
      const int inner_cuts = first_records[c + 1] - to.unit;
      const int tile = cut_tiles_before[c + 1] - 1;
      const int last =
          last_at_most(c + 1, params.num_teams, unit, [&](int i) { return cuts[i].unit; });
      record.partial_row = (inner_cuts + tile - 1) * slot_rows;
      record.cut_tile = tile;
      cut_tiles[tile] = {
          record.q_begin,     record.q_row_begin,
          record.kv_head,     min(int(height.tile_q.divisor), num_rows - item.q_row_begin),
          record.partial_row, first_records[last] - unit - inner_cuts + 2,
          slot_rows,          segment_idx};
    }
    records[r] = record;
    if (r == first_records[c]) shares[c].first = record;
  }

  // Requests that have no item, so that no record could say that they have no parts.
  if (params.invariant) {
#pragma unroll 1
    for (int i = blockIdx.x * kThreads + thread; i < params.batch_size * num_bundles;
         i += gridDim.x * kThreads) {
      const int request = params.num_bundles.quotient(i);
      if (found.item_starts[request + 1] == found.item_starts[request]) cut_tiles[i] = {};
    }
  }
}

}  // namespace ridgeline
