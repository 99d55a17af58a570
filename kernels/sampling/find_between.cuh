// Of every row with a histogram (collect_candidates.cuh): the few bins among whose elements top-k
// and top-p may end.
//
// The histogram has counts, and a bin bounds the mass of each of its elements to 2%, so the mass
// from any bin on is known to lie between two sums; what the other bins leave of the row's exact
// mass bounds it from the other side. A block of kRowThreads threads takes a row, and a thread four
// bins. Launch: num_rows blocks. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "sampling/filter.cuh"
#include "sampling/weight_bins.cuh"

namespace ridgeline {

struct BetweenScratch {
  BlockScratch block;
  uint32 counts_from[kWeightBins + 1];
  uint64 least_left, most_left;  // of the mass that top-p takes its share of
  uint32 k_bin;
  uint32 first;
  uint32 sure;
  Between between;
};

template <class Kind>
__global__ void __launch_bounds__(kRowThreads, 1)
    find_between(const __grid_constant__ NarrowParams params) {
  __shared__ BetweenScratch scratch;
  constexpr uint32 kShare = kWeightBins / kRowThreads;
  static_assert(kShare == 4, "a thread loads four counts at once");
  const uint32 row = blockIdx.x;
  const RowInput& input = params.input;
  const RowFilters filters(params.filters, row, input.vocab);
  pdl_launch_dependents();
  pdl_wait();
  const uint32 num_segments = num_segments_of(input.vocab);
  const RowSummary summary =
      summarize<Kind>(params.scratch.segments + static_cast<int64>(row) * num_segments,
                      num_segments, filters.rate, scratch.block);
  Between& between = params.scratch.between[row];
  const bool collected = filters.k > 0 && filters.k <= kMaxCollectedK;
  if (collected || !filters.any() || !summary.valid) {
    if (threadIdx.x == 0) between.listable = 0;
    return;
  }
  if (filters.k == 0 && filters.top_p >= 1.0) {
    if (threadIdx.x == 0) {
      const float all = value_of(Kind::kLeastKey);
      between = {1, 0, 0, kWeightBins, 0, 0, summary.max, 0, all, all, kInfinity, kInfinity, 0, 0};
    }
    return;
  }

  // Bins in falling order: mine are [top - 3, top].
  const uint32 top = kWeightBins - 1 - threadIdx.x * kShare;
  uint32 counts[kShare] = {};
  const uint32* histograms =
      params.scratch.histograms + static_cast<int64>(row) * params.scratch.num_parts * kWeightBins;
#pragma unroll 4
  for (uint32 part = 0; part < params.scratch.num_parts; ++part) {
    const auto loaded = load<4>(histograms + part * kWeightBins + top - 3);
#pragma unroll
    for (uint32 i = 0; i < kShare; ++i) counts[i] += loaded.elements[kShare - 1 - i];
  }
  const typename Kind::Weigher weigher = Kind::weigher(summary.max, filters.rate);
  const WeightBins<Kind> bins{params.scratch.references[row], filters.rate};
  uint64 least[kShare], most[kShare];
  uint64 count_sum = 0, least_sum = 0, most_sum = 0;
#pragma unroll
  for (uint32 i = 0; i < kShare; ++i) {
    const MassBounds bounds = bins.bounds(top - i, weigher);
    count_sum += counts[i];
    least_sum += bounds.least * counts[i];
    most_sum += bounds.most * counts[i];
    least[i] = least_sum;
    most[i] = most_sum;
  }
  if (threadIdx.x == 0) {
    scratch.k_bin = kWeightBins;
    scratch.first = 0;
    scratch.sure = kWeightBins;
    scratch.least_left = scratch.most_left = summary.mass;
    scratch.counts_from[kWeightBins] = 0;
  }
  const auto count_before = static_cast<uint32>(sum_before(count_sum, scratch.block));
  const uint64 least_before = sum_before(least_sum, scratch.block);
  const uint64 most_before = sum_before(most_sum, scratch.block);
  const uint64 least_total = block_total(least_sum, scratch.block);
  const uint64 most_total = block_total(most_sum, scratch.block);
  // Why the slack: segments' masses were rounded in their own units, and exponents of e octaves by
  // e * 2^-23, where rows of 2^21 elements have mass at e up to 21.
  const uint64 slack = summary.mass >> 17;
  // Bounds of the mass from the bin top - i on.
  const auto at_least = [&](uint32 i) {
    const uint64 from = least_before + least[i];
    const uint64 below = most_total - most_before - most[i];
    const uint64 sure = summary.mass - slack;
    const uint64 rest = sure > below ? sure - below : 0;
    return from > rest ? from : rest;
  };
  const auto at_most = [&](uint32 i) {
    const uint64 from = most_before + most[i];
    const uint64 below = least_total - least_before - least[i];
    const uint64 most_mass = summary.mass + slack;
    const uint64 rest = most_mass > below ? most_mass - below : 0;
    return from < rest ? from : rest;
  };

  uint32 count = count_before;
#pragma unroll
  for (uint32 i = 0; i < kShare; ++i) {
    const bool ends = filters.k > count && filters.k <= count + counts[i];
    if (ends) {
      scratch.k_bin = top - i;
      if (!params.filters.joint) {
        scratch.least_left = i == 0 ? least_before : at_least(i - 1);
        scratch.most_left = at_most(i);
      }
    }
    count += counts[i];
    scratch.counts_from[top - i] = count;
  }
  __syncthreads();
  const uint32 k_bin = scratch.k_bin;
  if (filters.top_p < 1.0) {
    const uint64 least_wanted = share_of(filters.top_p, scratch.least_left);
    const uint64 most_wanted = share_of(filters.top_p, scratch.most_left);
#pragma unroll
    for (uint32 i = 0; i < kShare; ++i) {
      if (at_most(i) < least_wanted) atomicMin(&scratch.sure, top - i);
      if (at_least(i) >= most_wanted) atomicMax(&scratch.first, top - i);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32 first = filters.top_p < 1.0 ? scratch.first : 0;
    uint32 sure = filters.top_p < 1.0 ? scratch.sure : 0;
    uint32 counted = 0;
    uint32 num_listed = 0;
    if (k_bin < kWeightBins) {
      first = first > k_bin ? first : k_bin;
      sure = sure > k_bin + 1 ? sure : k_bin + 1;
      const uint32 gap_end = first > k_bin ? first : k_bin + 1;
      const uint32* from = scratch.counts_from;
      counted = from[k_bin + 1] - from[gap_end] + from[sure];
      num_listed = from[k_bin] - from[k_bin + 1] + from[gap_end] - from[sure];
    } else {
      num_listed = scratch.counts_from[first] - scratch.counts_from[sure];
    }
    // Why the rate: beyond that, differences overflow before they are bins.
    const bool listable =
        k_bin > 0 && num_listed <= params.scratch.row_capacity && filters.rate < 1e30f;
    scratch.between = {listable, first, sure, k_bin, counted, 0, summary.max, 0, 0, 0, 0, 0, 0, 0};
  }
  __syncthreads();
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (warp < 4) {
    const uint32 bin = warp == 0   ? scratch.between.first
                       : warp == 1 ? scratch.between.sure
                       : warp == 2 ? k_bin
                                   : k_bin + 1;
    const float from = least_of_bin(bins, bin);
    if (lane == 0) (&scratch.between.first_from)[warp] = from;
  }
  __syncthreads();
  if (threadIdx.x == 0) between = scratch.between;
}

}  // namespace ridgeline
