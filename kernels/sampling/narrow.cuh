// The filters' threshold in a whole row, when candidates do not hold it, in two reads of the row.
//
// The first read fills a histogram of counts and masses over 2,048 bins of the weights' logarithm,
// 64 an octave. Bins before the threshold's are kept for sure, bins behind it are not; the second
// read lists the elements of the few bins between, and adds the masses of the sure ones by index,
// for the draw. The exact threshold is then found in the list. Bins follow the order of the
// elements (each step from x to its bin is monotone), so nothing is lost by their width. A list
// that does not fit leaves the row to plain radix selection.
#pragma once

#include "sampling/filter.cuh"

namespace ridgeline {

__device__ __forceinline__ uint32 octave_bin(const LogitWeigher& weigher, float x) {
  const float octaves = (weigher.reference - x) * weigher.rate;
  const uint32 bin = static_cast<uint32>(fminf(octaves * 64.0f, 2047.0f));
  return kMaxBins - 1 - bin;
}

__device__ __forceinline__ uint32 octave_bin(const ProbWeigher& weigher, float x) {
  const uint32 bin = (0x3f800000u - __float_as_uint(x * weigher.rate)) >> 17;
  return kMaxBins - 1 - (bin < kMaxBins ? bin : kMaxBins - 1);
}

template <bool kValue>
struct BoolConstant {
  static constexpr bool value = kValue;
};

struct ListSource {
  const uint64* list;
  uint32 count;
  Order order;

  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (uint32 i = threadIdx.x; i < count; i += kRowThreads) visit(list[i], order.value(list[i]));
  }
};

__device__ __forceinline__ void clear_bins(SelectScratch& scratch) {
  for (uint32 i = threadIdx.x; i < kMaxBins; i += kRowThreads) {
    scratch.counts[i] = scratch.low[i] = scratch.high[i] = 0;
  }
  __syncthreads();
}

// Counts (or masses) of the bins from `first` on.
template <bool kByMass>
__device__ __forceinline__ uint64 bins_from(uint32 first, SelectScratch& scratch) {
  uint64 sum = 0;
  for (uint32 i = first + threadIdx.x; i < kMaxBins; i += kRowThreads) {
    sum += kByMass ? static_cast<uint64>(scratch.high[i]) << 32 | scratch.low[i]
                   : uint64{scratch.counts[i]};
  }
  return block_total(sum, scratch.block);
}

// The bin in which the running sum reaches `wanted`, or the last one.
template <bool kByMass>
__device__ __forceinline__ uint32 bin_reaching(uint64 wanted, SelectScratch& scratch, bool& found) {
  found = find_bin<kByMass>(scratch, kMaxBins, wanted);
  const uint32 bin = found ? scratch.bin : 0;
  __syncthreads();
  return bin;
}

// What the first read tells: elements of the bins from `sure` on are kept, the list takes those of
// bins [first, sure) and of `k_bin`, where top-k ends. `gap` is what lies between k_bin and first:
// of no use but to count.
struct Between {
  uint32 first;
  uint32 sure;
  uint32 k_bin;
  bool limited;    // by top-k
  uint64 counted;  // elements of bins that are not listed, above k_bin
  uint64 weighed;  // their mass
  uint64 sure_mass;
  __device__ __forceinline__ bool lists(uint32 bin) const {
    return (bin >= first && bin < sure) || bin == k_bin;
  }
};

__device__ __forceinline__ Between bins_between(const RowFilters& filters, bool joint,
                                                uint64 row_mass, SelectScratch& scratch) {
  Between between{0, 0, kMaxBins, false, 0, 0, 0};
  if (filters.k > 0) {
    const uint32 bin = bin_reaching<false>(filters.k, scratch, between.limited);
    if (between.limited) {
      between.k_bin = between.first = bin;
      between.sure = bin + 1;
    }
  }
  if (filters.top_p < 1.0) {
    const bool of_k = between.limited && !joint;
    const uint32 k_bin = between.k_bin;
    const uint64 least = of_k ? bins_from<true>(k_bin + 1, scratch) : row_mass;
    const uint64 most = of_k ? bins_from<true>(k_bin, scratch) : row_mass;
    bool found;
    const uint32 early = bin_reaching<true>(share_of(filters.top_p, least), scratch, found);
    const uint32 late = bin_reaching<true>(share_of(filters.top_p, most), scratch, found);
    between.sure = early + 1 > between.sure ? early + 1 : between.sure;
    between.first = late > between.first ? late : between.first;
  }
  between.sure_mass = bins_from<true>(between.sure, scratch);
  if (between.limited) {
    const uint32 gap_end = between.first > between.k_bin ? between.first : between.k_bin + 1;
    const auto unlisted = [&](auto by_mass) -> uint64 {
      constexpr bool kByMass = decltype(by_mass)::value;
      return bins_from<kByMass>(between.k_bin + 1, scratch) - bins_from<kByMass>(gap_end, scratch) +
             bins_from<kByMass>(between.sure, scratch);
    };
    between.counted = unlisted(BoolConstant<false>{});
    between.weighed = unlisted(BoolConstant<true>{});
  }
  return between;
}

// On success the histogram holds the masses of the sure elements that min-p keeps, by their index's
// leading bits, and `list` the elements between.
template <class Source, class Weigher>
__device__ __forceinline__ bool list_between(const Source& source, const Weigher& weigher,
                                             const Between& between, uint64 floor, uint64 min_p_cut,
                                             int index_shift, uint64* list, uint32 capacity,
                                             SelectScratch& scratch) {
  clear_bins(scratch);
  if (threadIdx.x == 0) scratch.bin_count = 0;
  __syncthreads();
  const uint64 mask = source.order.index_mask();
  source.for_each([&](uint64 composite, float x) {
    if (composite < floor) return;
    const uint32 bin = octave_bin(weigher, x);
    if (bin >= between.sure) {
      if (composite >= min_p_cut) {
        add_mass(scratch, static_cast<uint32>((composite & mask) >> index_shift),
                 mass_of(weigher.weight(x)));
      }
    } else if (between.lists(bin)) {
      const uint32 place = atomicAdd(&scratch.bin_count, 1u);
      if (place < capacity) list[place] = composite;
    }
  });
  __syncthreads();
  return scratch.bin_count <= capacity;
}

struct Narrowed {
  uint64 cut;
  uint64 kept;  // mass
};

// Leaves in the histogram the masses of all that is kept, by index.
template <class Kind>
__device__ __forceinline__ bool narrow(const RowSource<typename Kind::Element>& source,
                                       const typename Kind::Weigher& weigher,
                                       const RowFilters& filters, bool joint,
                                       const RowSummary& summary, uint64* list, uint32 capacity,
                                       SelectScratch& scratch, Narrowed& narrowed) {
  const Order& order = source.order;
  const uint64 floor = order.last_of(Kind::kLeastKey);
  const int index_shift =
      order.index_bits > kDigitBits ? static_cast<int>(order.index_bits) - kDigitBits : 0;
  clear_bins(scratch);
  source.for_each([&](uint64 composite, float x) {
    if (composite < floor) return;
    const uint32 bin = octave_bin(weigher, x);
    atomicAdd(&scratch.counts[bin], 1u);
    add_mass(scratch, bin, mass_of(weigher.weight(x)));
  });
  __syncthreads();
  const Between between = bins_between(filters, joint, summary.mass, scratch);
  uint64 cut = floor;
  if (filters.min_p > 0.0) {
    const float bound = Kind::min_p_bound(summary.max, filters.min_p, filters.temperature);
    const uint64 least = order.last_of(key_of(fminf(bound, summary.max)));
    cut = cut > least ? cut : least;
  }
  const uint64 min_p_cut = cut;
  if (!list_between(source, weigher, between, floor, min_p_cut, index_shift, list, capacity,
                    scratch)) {
    return false;
  }
  const ListSource between_source{list, scratch.bin_count, order};

  // Selection needs the histogram, so the sums by index wait elsewhere.
  for (uint32 bin = threadIdx.x; bin < kMaxBins; bin += kRowThreads) {
    scratch.by_index[bin] = static_cast<uint64>(scratch.high[bin]) << 32 | scratch.low[bin];
  }
  __syncthreads();
  uint64 threshold = floor;
  const uint64 top = order.first_of(key_of(summary.max));
  if (between.limited) {
    select<false>(between_source, weigher, Range{floor, top}, ~uint64{0},
                  filters.k - between.counted, scratch, threshold);
  }
  if (filters.top_p < 1.0) {
    uint64 left = summary.mass;
    if (between.limited && !joint) {
      left = between.weighed + mass_from(between_source, weigher, threshold, scratch);
    }
    const uint64 wanted = share_of(filters.top_p, left);
    if (wanted > between.sure_mass) {
      select<true>(between_source, weigher, Range{threshold, top}, ~uint64{0},
                   wanted - between.sure_mass, scratch, threshold);
    }
  }
  cut = cut > threshold ? cut : threshold;

  for (uint32 bin = threadIdx.x; bin < kMaxBins; bin += kRowThreads) {
    scratch.high[bin] = static_cast<uint32>(scratch.by_index[bin] >> 32);
    scratch.low[bin] = static_cast<uint32>(scratch.by_index[bin]);
  }
  __syncthreads();
  between_source.for_each([&](uint64 composite, float x) {
    if (composite < cut) return;
    add_mass(scratch, static_cast<uint32>((composite & order.index_mask()) >> index_shift),
             mass_of(weigher.weight(x)));
  });
  __syncthreads();
  narrowed = {cut, bins_from<true>(0, scratch)};
  return true;
}

// The token at which the running mass by index passes `target`, after narrow().
template <class T, class Weigher>
__device__ __forceinline__ uint32 narrowed_token(const RowSource<T>& source, const Weigher& weigher,
                                                 uint64 cut, uint64 target,
                                                 SelectScratch& scratch) {
  const Order& order = source.order;
  const uint32 shift = order.index_bits > kDigitBits ? order.index_bits - kDigitBits : 0;
  find_bin<true>(scratch, kMaxBins, target + 1);
  const uint32 bin = scratch.bin;
  const uint64 rest = scratch.rest - 1;
  __syncthreads();
  // The bin's indices are 2^shift neighbours, at most two for each thread.
  const int64 first =
      static_cast<int64>(order.index_mask() + 1) - (static_cast<int64>(bin + 1) << shift);
  const auto mass_at = [&](uint32 i) -> uint64 {
    const int64 index = first + i;
    if (i >= 1u << shift || index >= source.vocab) return 0;
    const float x = to_float(source.row[index]);
    return order.composite(x, static_cast<uint32>(index)) < cut ? 0 : mass_of(weigher.weight(x));
  };
  const uint64 mass = mass_at(threadIdx.x * 2);
  const uint64 mine = mass + mass_at(threadIdx.x * 2 + 1);
  const uint64 before = sum_before(mine, scratch.block);
  if (before <= rest && rest < before + mine) {
    scratch.bin = static_cast<uint32>(first) + threadIdx.x * 2 + (rest < before + mass ? 0 : 1);
  }
  __syncthreads();
  return scratch.bin;
}

}  // namespace ridgeline
