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
// Decodes of one cost are cut evenly, where almost as many ranges as there are teams divide them:
// few are cut then, and no range is of pieces of two.
//
// In even parts, where tall tiles that cost about the same, as those over a shared prefix do, are
// most of the work: each is cut in the same number of parts, one a team, and the rest in short
// ones. First come the first parts of all tiles, which are read against the same keys, then the
// second ones; then the items of the segment before, few a range. Ranges beyond num_teams start
// where one is done: of two CTAs on an SM one is faster by a fifth.
//
// By tile, where no tile is too dear: whole items in four classes of cost, dearest first, each
// twice as dear as the next, or in eight, where keys that are read again in another class are in
// the L2 cache still. Nothing is cut, and what SMs differ in speed evens out. Where all cost
// the same, and few are left when every SM has had equally many, these are split into tiles of the
// low height: else a few SMs would work through one more while all others wait.
//
// All lengths are clamped, so that bad contents give wrong work but none out of bounds. All SMs.
//
// Each step of the way has one place in the code, and what it found is kept: in shared memory for
// up to kRequestsInSmem requests and kItemsInSmem items; beyond that in the list, where all CTAs
// write the same.
#pragma once

#include "attention/batch_params.h"
#include "attention/schedule_cuts.cuh"
#include "attention/schedule_items.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// The fields that every record of an item has.
template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ WorkRecord record_of(const ScheduleParams<kSegments>& params,
                                                const Found<Cost>& found, int index) {
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

// A list by tile of at most so many units a team is sorted finely.
inline constexpr int kFewRounds = 8;

// Whether there are items of all fractions of the dearest one's cost, as the tiles of causal
// prompts are, so that their mean is about half of it.
__device__ __forceinline__ bool has_cheap_ones(int num_items, int64 total_cost, int64 most_cost) {
  return 5 * total_cost <= 3 * most_cost * num_items;
}

// Whether whole items, dearest first, fill the GPU evenly: where none is as dear as a third of a
// CTA's share; or as a whole one, where cheap ones come last.
template <int kSegments>
__device__ __forceinline__ bool goes_by_tile(const ScheduleParams<kSegments>& params, int num_items,
                                             int64 total_cost, int64 most_cost) {
  return num_items <= params.max_tiles &&
         (has_cheap_ones(num_items, total_cost, most_cost) ? 1 : 3) * most_cost *
                 params.num_teams <=
             total_cost * params.num_bundles.divisor;
}

// Tiles of one head, the last of a list by tile, that are split.
template <int kSegments>
__device__ __forceinline__ int num_split_of(const ScheduleParams<kSegments>& params, int num_items,
                                            int64 total_cost, int64 most_cost) {
  if (kSegments > 1 || total_cost != most_cost * num_items) return 0;
  const int num_tiles = num_items * int(params.num_bundles.divisor) * params.team_size;
  const int num_left = params.num_sms.remainder(num_tiles);
  return num_left <= params.max_split ? num_left : 0;
}

// Items by class of cost, the dearest class first, and the last items of a class first: the last
// query tiles of a causal request are the dearest. A class is half as dear as the one before, or,
// `finely`, two thirds to three fourths, by what items cost for their keys alone.
template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ void write_by_tile(const ScheduleParams<kSegments>& params,
                                              const Found<Cost>& found, int num_items, Cost most,
                                              bool finely,
                                              int64 (&warp_sums)[2][schedule_threads(kTall) / 32],
                                              int turn) {
  constexpr int kThreads = schedule_threads(kTall);
  constexpr int kSums = 2, kClassesOfSum = 4;  // counts of 16 bits each
  const ScheduleSegment& segment = params.segments[kSegments - 1];
  const Cost apart =
      finely ? Cost(segment.heights[segment.num_heights - 1].tile_cost) * params.num_bundles.divisor
             : Cost(0);
  const Cost top = most - apart;
  const int num_sums = finely ? kSums : 1;
  const auto class_of = [&](int index) {
    const Cost cost = found.costs[index + 1] - found.costs[index] - apart;
    int place = 0;
#pragma unroll
    for (int i = 1; i < kSums * kClassesOfSum; ++i) {
      const Cost limit = (i % 2 == 0 ? top : top - top / 4) >> (i / 2);
      place += cost <= limit && (finely || i % 2 == 0);
    }
    return place;
  };
  // What an item adds to the counts of a sum's classes.
  const auto one_of = [&](int index, int sum) -> int64 {
    const int place = index < num_items ? class_of(index) - sum * kClassesOfSum : -1;
    return place >= 0 && place < kClassesOfSum ? 1ll << (16 * place) : 0;
  };
  int64 of_classes[kSums] = {};
  Sums<int64> sums[kSums];
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      if (sum >= num_sums) break;
      sums[sum] = exclusive_sum<kThreads>(one_of(base + threadIdx.x, sum), warp_sums[turn]);
      turn ^= 1;
      of_classes[sum] += sums[sum].total;
    }
  }
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  int64 before[kSums] = {};
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
    const int index = base + threadIdx.x;
    int end = 0;
    int place = -1;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      if (sum >= num_sums) break;
      const int64 one = one_of(index, sum);
      if (num_items > kThreads) {
        sums[sum] = exclusive_sum<kThreads>(one, warp_sums[turn]);
        turn ^= 1;
      }
      const int64 rank = before[sum] + sums[sum].before;
      before[sum] += sums[sum].total;
#pragma unroll
      for (int shift = 0; shift < 16 * kClassesOfSum; shift += 16) {
        end += int(of_classes[sum] >> shift) & 0xffff;
        if (one >> shift == 1) place = end - 1 - (int(rank >> shift) & 0xffff);
      }
    }
    if (place < 0 || base / kThreads % gridDim.x != blockIdx.x) continue;
    records[place] = record_of<kTall>(params, found, index);
  }
}

// What a block keeps in shared memory, beside what it found.
template <bool kTall>
struct ScheduleSmem {
  static constexpr int kWarps = schedule_threads(kTall) / 32;
  int64 warp_sums[2][kWarps];
  int64 warp_mosts[2][kWarps];  // of each segment
  int warp_cuts[kWarps];
  Cut cuts[kMaxBatchCtas + 1];
  int first_records[kMaxBatchCtas + 1];
  int cut_tiles_before[kMaxBatchCtas + 1];  // units that cuts up to this one go through
};

// Items of all requests, and how they were found.
struct Items {
  int count;
  bool one_each;         // every request is one, and has a thread, which keeps it
  bool cheap;            // costs of few items fit 31 bits
  ScheduledRequest own;  // of this thread, in the last place
  int turn;              // of the next sum
};

// The requests, and where each one's items begin.
template <bool kTall, int kSegments>
__device__ __forceinline__ Items find_requests(const ScheduleParams<kSegments>& params,
                                               ScheduledRequest* requests, int* item_starts,
                                               ScheduleSmem<kTall>& smem) {
  constexpr int kThreads = schedule_threads(kTall);
  const int thread = threadIdx.x;
  Items result;
  result.turn = 0;
  int64 items_before = 0;
  bool cheap = true;
  result.one_each = params.batch_size <= kThreads;
#pragma unroll 1
  for (int base = 0; base < params.batch_size; base += kThreads) {
    const int request = base + thread;
    int64 count = request < params.batch_size ? 0 : 1;
    if (request < params.batch_size) {
      result.own = scheduled_request(params, request);
      requests[request] = result.own;
      const int num_rows = num_rows_of(params, result.own.lengths);
      const ScheduleSegment& segment = params.segments[segment_of(params, request)];
      const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
      cheap = cheap && int64(result.own.lengths.kv_len) * params.num_bundles.divisor < kFewKeys;
      count = kTall ? int(height.tile_q.quotient(num_rows + height.tile_q.divisor - 1))
                    : int(num_rows > 0);
      if (params.invariant && count == 1) {
        const ScheduledItem tile = whole_tile<kTall>(params, result.own, height, request, 0);
        count = invariant_pieces(height, num_kv_tiles(height, tile));
      }
    }
    // A batch of decodes needs no sums.
    if (result.one_each) result.one_each = __syncthreads_and(count == 1 && cheap);
    if (result.one_each) {
      if (request < params.batch_size) item_starts[request] = request;
      items_before = params.batch_size;
      break;
    }
    if (request >= params.batch_size) count = 0;
    const Sums<int64> sums = exclusive_sum<kThreads>(count, smem.warp_sums[result.turn]);
    result.turn ^= 1;
    const int64 before = items_before + sums.before;
    if (request < params.batch_size) {
      item_starts[request] = int(min(before, int64(params.max_items)));
    }
    items_before = min(items_before + sums.total, int64(params.max_items));
  }
  result.count = int(items_before);
  if (thread == 0) item_starts[params.batch_size] = result.count;
  result.cheap = result.one_each || __syncthreads_and(cheap);
  return result;
}

template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ void make_list(const ScheduleParams<kSegments>& params,
                                          const Found<Cost>& found, const Items& items,
                                          ScheduleSmem<kTall>& smem) {
  constexpr int kThreads = schedule_threads(kTall);
  constexpr int kWarps = kThreads / 32;
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int num_bundles = params.num_bundles.divisor;
  const int num_items = items.count;
  ScheduledRequest own_request = items.own;
  int turn = items.turn;

  // The items and their costs.
  Cost cost_before = 0;
  Cost most_costs[kSegments] = {};
  bool equal = !kTall && items.one_each && !params.invariant;
#pragma unroll 1
  for (int base = 0; base < num_items; base += kThreads) {
    const int index = base + thread;
    Cost cost = 0;
    if (index < num_items) {
      int request = index, place = 0;
      if (!items.one_each) {
        request =
            last_at_most(0, params.batch_size, index, [&](int i) { return found.item_starts[i]; });
        own_request = found.requests[request];
        place = index - found.item_starts[request];
      }
      const int num_rows = num_rows_of(params, own_request.lengths);
      const ScheduleSegment& segment = params.segments[segment_of(params, request)];
      const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
      const bool one_tile = !kTall || num_rows <= int(height.tile_q.divisor);
      ScheduledItem item =
          whole_tile<kTall>(params, own_request, height, request, one_tile ? 0 : place);
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
      cost = Cost(cost_of(height, num_tiles)) * num_bundles;
      const int segment_idx = segment_of(params, request);
#pragma unroll
      for (int i = 0; i < kSegments; ++i) {
        if (i == segment_idx) most_costs[i] = max(most_costs[i], cost);
      }
    }
    const Sums<Cost> sums =
        exclusive_sum<kThreads>(cost, reinterpret_cast<Cost*>(smem.warp_sums[turn]));
    turn ^= 1;
    if (index < num_items) {
      found.costs[index] = cost_before + sums.before;
      equal = equal && sums.before == index * cost;
    }
    cost_before += sums.total;
  }
  if (thread == 0) found.costs[num_items] = cost_before;
  if (kTall) {
#pragma unroll
    for (int i = 0; i < kSegments; ++i) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        most_costs[i] = max(most_costs[i], __shfl_xor_sync(0xffffffffu, most_costs[i], distance));
      }
      if (lane == 0) smem.warp_mosts[i][warp] = most_costs[i];
    }
  }
  equal = __syncthreads_and(equal);
  const int num_units = num_items * num_bundles;
  const bool whole =
      !kTall && !params.invariant &&
      __syncthreads_and(stays_whole(params.segments[0].heights[0], most_costs[0], cost_before,
                                    num_units, params.num_teams, num_bundles));

  ListHeader header = {};
  header.tag = params.tag;
  header.num_tokens = tokens_of<kSegments>(params.segments[0]);
  if constexpr (kSegments > 1) header.num_tokens_b = tokens_of<kSegments>(params.segments[1]);
  EvenParts even = {};
  if (kTall) {
    Cost most_cost = 0;
#pragma unroll
    for (int i = 0; i < kSegments; ++i) {
#pragma unroll
      for (const int64 of_warp : smem.warp_mosts[i]) {
        most_costs[i] = max(most_costs[i], Cost(of_warp));
      }
      most_cost = max(most_cost, most_costs[i]);
    }
    if (goes_by_tile(params, num_items, cost_before, most_cost)) {
      header.by_tile = 1 + num_split_of(params, num_items, cost_before, most_cost);
      header.num_records = num_items;
      if (thread == 0 && blockIdx.x == 0) *reinterpret_cast<ListHeader*>(params.list) = header;
      // Where tiles are few, the order of the last ones is much of the time.
      const bool finely = params.may_sort_finely && num_units <= kFewRounds * params.num_teams &&
                          has_cheap_ones(num_items, cost_before, most_cost);
      write_by_tile<kTall>(params, found, num_items, most_cost, finely, smem.warp_sums, turn);
      return;
    }
    even = even_parts(params, found, num_items, kSegments > 1 ? most_costs[0] : 0,
                      most_costs[kSegments - 1]);
  }
  const int num_equal = whole   ? num_units
                        : equal ? ranges_of_equals(params, num_units, cost_before)
                                : 0;
  const int num_ranges = even.num_parts > 0 ? even.num_ranges
                         : num_equal > 0    ? num_equal
                                            : params.num_teams;

  // Cuts, and how many there are up to each: inner ones, and in the upper half the units they cut.
  // The first lane of a warp has the cut before the warp's own.
  int cuts_before = 0;
#pragma unroll 1
  for (int base = 0; base < num_ranges; base += kWarps * 31) {
    if (base > 0) __syncthreads();
    const int c = base + warp * 31 + lane - 1;
    Cut cut = {-1, 0};
    if (c >= 0 && c < num_ranges && num_items > 0) {
      cut = kTall && even.num_parts > 0 ? find_even_cut<kTall>(params, found, num_items, even, c)
            : num_equal > 0             ? find_equal_cut(params, found, num_units, num_ranges, c)
                                        : find_cut<kTall>(params, found, num_items, c);
    }
    const int unit_before = __shfl_up_sync(0xffffffffu, cut.unit, 1);
    const int tile_before = __shfl_up_sync(0xffffffffu, cut.kv_tile, 1);
    const bool in_unit = lane > 0 && cut.kv_tile > 0;
    const uint32 inner = __ballot_sync(
        0xffffffffu, in_unit && (unit_before != cut.unit || tile_before != cut.kv_tile));
    const uint32 first =
        __ballot_sync(0xffffffffu, in_unit && (unit_before != cut.unit || tile_before == 0));
    if (lane == 0) smem.warp_cuts[warp] = __popc(inner) + (__popc(first) << 16);
    __syncthreads();
    const uint32 up_to_own = 0xffffffffu >> (31 - lane);
    int up_to = cuts_before + __popc(inner & up_to_own) + (__popc(first & up_to_own) << 16);
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const int of_warp = smem.warp_cuts[other];
      if (other < warp) up_to += of_warp;
      cuts_before += of_warp;
    }
    if (lane > 0 && c < num_ranges) {
      if (num_items == 0) cut.unit = 0;
      smem.cuts[c] = cut;
      smem.first_records[c] = cut.unit + up_to % 65536;
      smem.cut_tiles_before[c] = up_to / 65536;
    }
  }
  const int num_cut_tiles = cuts_before / 65536;
  header.num_records = num_units + cuts_before % 65536;
  header.num_ranges = num_ranges;
  header.num_cut_tiles = params.invariant ? params.batch_size * num_bundles : num_cut_tiles;
  header.most_pieces =
      params.invariant ? kInvariantPieces : cuts_before % 65536 - num_cut_tiles + 2;
  if (even.num_parts > 0) header.most_pieces = even.num_parts + even.num_short;
  if (thread == 0) {
    smem.cuts[num_ranges] = {num_units, 0};
    smem.first_records[num_ranges] = header.num_records;
    smem.cut_tiles_before[num_ranges] = num_cut_tiles;
    if (blockIdx.x == 0) *reinterpret_cast<ListHeader*>(params.list) = header;
  }
  __syncthreads();

  // The records, and with its first part each tile that was cut.
  const int slot_rows = params.slot_rows * params.team_size;
  TeamShare* shares = reinterpret_cast<TeamShare*>(params.list + kSharesAt);
  WorkRecord* records = reinterpret_cast<WorkRecord*>(params.list + params.records_at);
  CutTile* cut_tiles = reinterpret_cast<CutTile*>(params.list + kCutTilesAt);
  for (int c = blockIdx.x * kThreads + thread; c < params.max_ranges; c += gridDim.x * kThreads) {
    TeamShare& share = shares[even.place_of(c)];
    share.begin = c < num_ranges ? smem.first_records[c] : 0;
    share.end = c < num_ranges ? smem.first_records[c + 1] : 0;
  }
#pragma unroll 1
  for (int r = blockIdx.x * kThreads + thread; r < header.num_records; r += gridDim.x * kThreads) {
    const int c = last_at_most(0, num_ranges, r, [&](int i) { return smem.first_records[i]; });
    const Cut from = smem.cuts[c], to = smem.cuts[c + 1];
    const int place = from.unit + r - smem.first_records[c];
    // In even parts the tiles come first.
    const int before = even.num_parts > 0 ? even.num_before * num_bundles : 0;
    const int unit = place + before < num_units ? place + before : place + before - num_units;
    const int index = params.num_bundles.quotient(unit);
    const ScheduledItem item = found.items[index];
    WorkRecord record = record_of<kTall>(params, found, index);
    if (even.by_warps && c >= even.num_of_tiles) record.segment_height |= kByWarps;
    const int segment_idx = segment_of(params, item.request);
    const TileHeight& height = params.segments[segment_idx].heights[record.segment_height % 256];
    const int num_rows = record.qo_len * int(params.group_size.divisor);
    const int kv_tile = height.kv_tile.divisor;
    const int begin = r == smem.first_records[c] ? from.kv_tile : 0;
    const bool ends_inside = place == to.unit;
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
      const int inner_cuts = smem.first_records[c] - from.unit;
      record.partial_row = (inner_cuts + smem.cut_tiles_before[c] - 1) * slot_rows;
      record.cut_tile = smem.cut_tiles_before[c] - 1;
    } else if (ends_inside) {
      const int inner_cuts = smem.first_records[c + 1] - to.unit;
      const int tile = smem.cut_tiles_before[c + 1] - 1;
      const int last =
          last_at_most(c + 1, num_ranges, place, [&](int i) { return smem.cuts[i].unit; });
      record.partial_row = (inner_cuts + tile - 1) * slot_rows;
      record.cut_tile = tile;
      cut_tiles[tile] = {
          record.q_begin,     record.q_row_begin,
          record.kv_head,     min(int(height.tile_q.divisor), num_rows - item.q_row_begin),
          record.partial_row, smem.first_records[last] - place - inner_cuts + 2,
          slot_rows,          segment_idx};
    }
    records[r] = record;
    if (r == smem.first_records[c]) shares[even.place_of(c)].first = record;
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

template <bool kTall, int kSegments = 1>
__global__ void __launch_bounds__(schedule_threads(kTall), 1)
    schedule(const __grid_constant__ ScheduleParams<kSegments> params) {
  __shared__ ScheduleSmem<kTall> smem;
  __shared__ ScheduledRequest few_requests[kRequestsInSmem];
  __shared__ int few_starts[kRequestsInSmem + 1];
  __shared__ ScheduledItem few_items[kItemsInSmem];
  __shared__ int few_costs[kItemsInSmem + 1];
  pdl_wait();
  pdl_launch_dependents();
  ScheduledRequest* requests = few_requests;
  int* starts = few_starts;
  Items items;
  // Why each step twice: an address that may be of either memory takes longer, as sums of 64 bits
  // do.
  if (params.batch_size <= kRequestsInSmem) {
    items = find_requests<kTall>(params, few_requests, few_starts, smem);
    if (items.count <= kItemsInSmem && items.cheap) {
      make_list<kTall>(params, Found<int>{few_requests, few_starts, few_items, few_costs}, items,
                       smem);
      return;
    }
  } else {
    requests = reinterpret_cast<ScheduledRequest*>(params.list + params.requests_at);
    starts = params.list + params.item_starts_at;
    items = find_requests<kTall>(params, requests, starts, smem);
  }
  const Found<int64> found = {requests, starts,
                              reinterpret_cast<ScheduledItem*>(params.list + params.items_at),
                              reinterpret_cast<int64*>(params.list + params.costs_at)};
  make_list<kTall>(params, found, items, smem);
}

}  // namespace ridgeline
