// Where the scheduler cuts the line of units: into ranges of equal cost, or tiles of equal cost
// into even parts.
#pragma once

#include "attention/batch_params.h"
#include "attention/schedule_items.cuh"

namespace ridgeline {

// Short parts are this share of a tile in even parts, all together.
inline constexpr int kShortShare = 16;
// So few items are a range then, that the last ones end at about the same time.
inline constexpr int kItemsOfRange = 2;

// So many steps a team at most where units of one cost are shared out evenly.
inline constexpr int kEqualSteps = 56;

// A place in the line of units: KV tile kv_tile of a unit.
struct Cut {
  int unit;
  int kv_tile;
};

// What earlier steps found. Costs are of 32 bits where these are enough.
template <typename Cost>
struct Found {
  ScheduledRequest* requests;  // [batch_size]
  int* item_starts;            // [batch_size + 1]
  ScheduledItem* items;        // [num_items]
  Cost* costs;                 // [num_items + 1], of all bundles, summed over the items before
};

// Ranges of a list in even parts: those of the tiles, tile by tile, then those of the items before.
struct EvenParts {
  int num_before;    // items before the tiles
  int num_units;     // of the tiles
  int num_parts;     // of a tile, one a team; 0: the list is another
  int num_short;     // of a tile, beside these
  int num_of_tiles;  // ranges of the tiles
  int num_ranges;
  bool by_warps;  // the items before are a warp's each

  // Where a range is among all: the first parts of all tiles, then the second ones.
  __device__ __forceinline__ int place_of(int range) const {
    if (range >= num_of_tiles) return range;
    const int unit = uint32(range) / uint32(num_parts + num_short);
    return (range - unit * (num_parts + num_short)) * num_units + unit;
  }
};

// The cut at a place on the line of costs; `whole`: at a unit's end.
template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ Cut cut_at(const ScheduleParams<kSegments>& params,
                                      const Found<Cost>& found, int num_items, Cost place,
                                      bool whole) {
  const int num_bundles = params.num_bundles.divisor;
  const Cost total = found.costs[num_items];
  const int index = last_at_most(0, num_items, place, [&](int i) { return found.costs[i]; });
  const Cost rest = place - found.costs[index];
  const ScheduledItem item = found.items[index];
  const ScheduleSegment& segment = params.segments[segment_of(params, item.request)];
  const int num_rows = num_rows_of(params, found.requests[item.request].lengths);
  const TileHeight& height = segment.heights[height_of<kTall>(segment, num_rows)];
  const int num_tiles = num_kv_tiles(height, item);
  const Cost cost = Cost(cost_of(height, num_tiles));
  // Why by 32 bits: a division of 64 takes ten times as long.
  const int bundle = num_bundles == 1     ? 0
                     : total < kMaxLength ? int(uint32(rest) / uint32(cost))
                                          : int(rest / cost);
  const Cost within = rest - bundle * cost;
  const Cut begin = {index * num_bundles + bundle, 0};
  const Cut end = {begin.unit + 1, 0};
  if (whole) return 2 * within < cost ? begin : end;
  const int keys_cost = int(min(max(within - height.tile_cost, Cost(0)), Cost(kMaxLength)));
  const int before = min(int(height.steps_of_cost.quotient(keys_cost)), num_tiles);
  const int after = num_tiles - before;
  const float share = __fdividef(float(total), float(params.num_teams * 32 * height.step_cost));
  const int least = max(height.min_kv_tiles, int(fminf(share, 1e9f)));
  if (before == 0 || (before < least && before <= after)) return begin;
  if (after < least) return end;
  return {begin.unit, before};
}

// count * c / num, where c <= num <= kMaxBatchCtas. Why shifted: the product must fit 31 bits, and
// a cut may be off by a millionth of the work.
template <typename Cost, typename Quotient>
__device__ __forceinline__ Cost fraction(Cost count, int c, Quotient quotient) {
  const int shift = max(0, 43 - __clzll(count));
  return Cost(quotient(uint32(count >> shift) * c)) << shift;
}

// Where the line of costs is cut for the c-th time.
template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ Cut find_cut(const ScheduleParams<kSegments>& params,
                                        const Found<Cost>& found, int num_items, int c) {
  const Cost place =
      fraction(found.costs[num_items], c, [&](uint32 n) { return params.team_count.quotient(n); });
  return cut_at<kTall>(params, found, num_items, place, params.invariant != 0);
}

// The same in even parts, where units are numbered from the tiles' first on.
template <bool kTall, int kSegments, typename Cost>
__device__ __forceinline__ Cut find_even_cut(const ScheduleParams<kSegments>& params,
                                             const Found<Cost>& found, int num_items,
                                             const EvenParts& even, int c) {
  if (c >= even.num_of_tiles) {
    const uint32 num_ranges = even.num_ranges - even.num_of_tiles;
    const Cost place = num_ranges == 0
                           ? Cost(0)
                           : fraction(found.costs[even.num_before], c - even.num_of_tiles,
                                      [&](uint32 n) { return n / num_ranges; });
    return {even.num_units + cut_at<kTall>(params, found, num_items, place, true).unit, 0};
  }
  const int num_ranges = even.num_parts + even.num_short;
  const int unit = uint32(c) / uint32(num_ranges);
  const int part = c - unit * num_ranges;
  const ScheduledItem item = found.items[even.num_before + params.num_bundles.quotient(unit)];
  const ScheduleSegment& segment = params.segments[segment_of(params, item.request)];
  const int num_rows = num_rows_of(params, found.requests[item.request].lengths);
  const int num_tiles = num_kv_tiles(segment.heights[height_of<kTall>(segment, num_rows)], item);
  const int of_short = even.num_short > 0 ? num_tiles / kShortShare : 0;
  const int of_parts = num_tiles - of_short;
  const bool is_short = part >= even.num_parts;
  const uint32 count = is_short ? of_short : of_parts;
  const uint32 num = is_short ? even.num_short : even.num_parts;
  const uint32 place = is_short ? part - even.num_parts : part;
  // Why in two terms: their product may not fit 32 bits.
  const int before = count / num * place + count % num * place / num;
  return {unit, is_short ? of_parts + before : before};
}

// Decodes that all cost the same: as many ranges as give each the same number of whole units, or a
// half of one, where a sixteenth of the teams or fewer go without; or all teams, where they are a
// multiple of the units. 0: there is no such number, or so much work that the teams which go
// without cost more than cuts.
template <int kSegments, typename Cost>
__device__ __forceinline__ int ranges_of_equals(const ScheduleParams<kSegments>& params,
                                                uint32 num_units, Cost total) {
  const int step_cost = params.segments[0].heights[0].step_cost;
  if (num_units == 0 || total > Cost(kEqualSteps) * step_cost * params.num_teams) return 0;
  const int lane = threadIdx.x % 32;
  const uint32 num_ranges = params.num_teams - lane;
  const bool fits = lane <= params.num_teams / 16 &&
                    (num_units % num_ranges == 0 || num_ranges == 2 * num_units ||
                     (lane == 0 && num_ranges % num_units == 0));
  const uint32 all = __ballot_sync(0xffffffffu, fits);
  return all == 0 ? 0 : params.num_teams + 1 - __ffs(all);
}

// Where the units of such a list are cut for the c-th time.
template <int kSegments, typename Cost>
__device__ __forceinline__ Cut find_equal_cut(const ScheduleParams<kSegments>& params,
                                              const Found<Cost>& found, uint32 num_units,
                                              uint32 num_ranges, uint32 c) {
  const uint32 unit = num_units * c / num_ranges;
  const uint32 rest = num_units * c - unit * num_ranges;
  const uint32 num_tiles = num_kv_tiles(params.segments[0].heights[0], found.items[0]);
  return {int(unit), int(num_tiles * rest / num_ranges)};
}

// Whether the last segment's tiles are cut in even parts, and how: where almost all teams get one,
// and what is before them can be shared out whole.
template <int kSegments, typename Cost>
__device__ __forceinline__ EvenParts even_parts(const ScheduleParams<kSegments>& params,
                                                const Found<Cost>& found, int num_items,
                                                int64 most_before, int64 most_cost) {
  EvenParts even = {};
  if (kSegments > 1) even.num_before = found.item_starts[params.segments[0].batch_size];
  const int num_bundles = params.num_bundles.divisor;
  const int num_tiles = num_items - even.num_before;
  if (num_tiles == 0 || num_tiles > params.num_teams) return even;
  even.num_units = num_tiles * num_bundles;
  if (even.num_units > params.num_teams) return even;
  const ScheduleSegment& segment = params.segments[kSegments - 1];
  const TileHeight& height = segment.heights[segment.num_heights - 1];
  const int64 total = found.costs[num_items];
  const int64 of_before = found.costs[even.num_before];
  const int64 of_tiles = total - of_before;
  const int num_parts = params.num_teams / even.num_units;
  const int64 of_parts = int64(params.num_teams) * most_cost * num_tiles;  // of num_teams parts
  const int64 share = total * (num_parts * even.num_units);
  const bool fits =
      16 * (most_cost * num_tiles - of_tiles) <= of_tiles && 16 * of_parts <= 17 * share &&
      6 * of_before <= total && 16 * params.num_teams * most_before <= total * num_bundles &&
      of_tiles > int64(2 * num_parts * height.min_kv_tiles) * even.num_units * height.step_cost;
  if (params.max_ranges < 2 * params.num_teams || !fits) return even;
  even.num_parts = num_parts;
  even.num_of_tiles = num_parts * even.num_units;
  const int num_short = max(1, params.num_teams / (2 * even.num_units));
  const int64 least_short =
      int64(num_short * kShortShare) * height.min_kv_tiles * height.step_cost * even.num_units;
  if (16 * of_before < total && of_tiles >= least_short) {
    even.num_short = num_short;
    even.num_of_tiles += num_short * even.num_units;
  }
  const ScheduleSegment& before = params.segments[0];
  even.by_warps = kSegments > 1 && before.num_heights == 1 &&
                  most_before <= cost_of(before.heights[0], params.few_tiles) * num_bundles;
  const int items_of_range = even.by_warps ? kRecordsByWarps : kItemsOfRange;
  const int items_left = (even.num_before * num_bundles + items_of_range - 1) / items_of_range;
  even.num_ranges = min(even.num_of_tiles + items_left, params.max_ranges);
  return even;
}

}  // namespace ridgeline
