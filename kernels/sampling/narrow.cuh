// The filters' threshold of a row of which list_between made a list, and the draw from it.
#pragma once

#include "sampling/filter.cuh"

namespace ridgeline {

struct ListSource {
  const uint64* list;
  uint32 count;
  Order order;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 2
    for (uint32 i = threadIdx.x; i < count; i += kRowThreads) visit(list[i], order.value(list[i]));
  }
};

// Why past L1: list_between reads and then changes it, on this SM too, and a kernel that starts
// before another ends finds in L1 what that one has read.
__device__ __forceinline__ Between between_of(const Scratch& memory, uint32 row) {
  constexpr int kWords = sizeof(Between) / sizeof(uint4);
  static_assert(kWords * sizeof(uint4) == sizeof(Between), "whole words");
  union {
    uint4 words[kWords];
    Between between;
  } read;
  const uint4* words = reinterpret_cast<const uint4*>(memory.between + row);
#pragma unroll
  for (int i = 0; i < kWords; ++i) read.words[i] = __ldcg(words + i);
  return read.between;
}

// The least listed composite from `floor` on.
__device__ __forceinline__ uint64 least_from(const ListSource& source, uint64 floor,
                                             SelectScratch& scratch) {
  uint64 least = ~uint64{0};
  source.for_each([&](uint64 composite, float) {
    if (composite >= floor && composite < least) least = composite;
  });
  return block_min(least, scratch.block);
}

struct Narrowed {
  uint64 cut;
  uint64 kept;  // mass
};

// Leaves in the histogram the masses of all that is kept, by segment from the last bin down. False
// when there is no list.
template <class Kind>
__device__ __forceinline__ bool narrow(const Scratch& memory, uint32 row, uint32 vocab,
                                       const Order& order, const typename Kind::Weigher& weigher,
                                       const RowFilters& filters, bool joint,
                                       const RowSummary& summary, SelectScratch& scratch,
                                       Narrowed& narrowed) {
  if (!memory.between) return false;
  const Between between = between_of(memory, row);
  if (!between.listable) return false;
  const uint32 num_segments = num_segments_of(vocab);
  const uint64* kept_of = memory.kept + static_cast<int64>(row) * num_segments;
  const ListSource source{list_of(memory, row), between.num_listed, order};
  uint64 sure_mass = 0;
  for (uint32 i = threadIdx.x; i < num_segments; i += kRowThreads) sure_mass += kept_of[i];
  sure_mass = block_total(sure_mass, scratch.block) + between.dropped;

  const uint64 floor = order.last_of(Kind::kLeastKey);
  const uint64 top = order.first_of(key_of(summary.max));
  uint64 threshold = floor;
  const bool limited = between.k_bin < kWeightBins;
  bool found = limited && select<false>(source, weigher, Range{floor, top}, ~uint64{0},
                                        filters.k - between.counted, scratch, threshold);
  if (filters.top_p < 1.0) {
    uint64 left = summary.mass;
    if (limited && !joint) {
      left = sure_mass + between.gap + mass_from(source, weigher, threshold, scratch);
    }
    const uint64 wanted = share_of(filters.top_p, left);
    if (wanted <= sure_mass) return false;
    // Elements of k_bin, when the list has a gap above it, are out of the question.
    if (select<true>(source, weigher, Range{threshold, top}, ~uint64{0}, wanted - sure_mass,
                     scratch, threshold)) {
      found = true;
    } else if (between.first > (limited ? between.k_bin : 0)) {
      return false;
    }
  }
  // Why not select's threshold: it tells listed elements apart, but others of the row may lie
  // between it and the least of those.
  if (found) threshold = least_from(source, threshold, scratch);
  uint64 cut = threshold;
  if (filters.min_p > 0.0) {
    const float bound = Kind::min_p_bound(summary.max, filters.min_p, filters.temperature);
    const uint64 least = order.last_of(key_of(fminf(bound, summary.max)));
    cut = cut > least ? cut : least;
  }

  for (uint32 i = threadIdx.x; i < kMaxBins; i += kRowThreads) {
    const uint64 mass = i < num_segments ? kept_of[i] : 0;
    scratch.counts[kMaxBins - 1 - i] = 0;
    scratch.low[kMaxBins - 1 - i] = static_cast<uint32>(mass);
    scratch.high[kMaxBins - 1 - i] = static_cast<uint32>(mass >> 32);
  }
  __syncthreads();
  uint64 listed = 0;
  source.for_each([&](uint64 composite, float x) {
    if (composite < cut) return;
    const uint64 mass = mass_of(weigher.weight(x));
    listed += mass;
    add_mass(scratch, kMaxBins - 1 - order.index(composite) / kSegmentSize, mass);
  });
  listed = block_total(listed, scratch.block);
  narrowed = {cut, sure_mass - between.dropped + listed};
  return true;
}

// The token at which the running mass by index passes `target`, after narrow().
template <class T, class Weigher>
__device__ __forceinline__ uint32 narrowed_token(const RowSource<T>& source, const Weigher& weigher,
                                                 uint64 cut, uint64 target,
                                                 SelectScratch& scratch) {
  const Order& order = source.order;
  find_bin<true>(scratch, kMaxBins, target + 1);
  const uint32 first = (kMaxBins - 1 - scratch.bin) * kSegmentSize;
  const uint64 rest = scratch.rest - 1;
  __syncthreads();
  // Two neighbours a thread.
  static_assert(kSegmentSize == 2 * kRowThreads, "a thread takes two elements");
  const auto mass_at = [&](uint32 index) -> uint64 {
    if (index >= source.vocab) return 0;
    const float x = to_float(source.row[index]);
    return order.composite(x, index) < cut ? 0 : mass_of(weigher.weight(x));
  };
  const uint32 mine_at = first + threadIdx.x * 2;
  const uint64 mass = mass_at(mine_at);
  const uint64 mine = mass + mass_at(mine_at + 1);
  const uint64 before = sum_before(mine, scratch.block);
  if (before <= rest && rest < before + mine) {
    scratch.bin = rest < before + mass ? mine_at : mine_at + 1;
  }
  __syncthreads();
  return scratch.bin;
}

}  // namespace ridgeline
