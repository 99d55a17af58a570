// What top-k, top-p and min-p keep of a row: all elements from one composite on.
//
// Top-k comes first, then top-p of what it leaves (or, `joint`, of the whole row's mass), then
// min-p, relative to the largest. Each keeps the first elements of one order, so together they keep
// those from the highest of three thresholds on.
#pragma once

#include "sampling/select.cuh"
#include "sampling/sources.cuh"

namespace ridgeline {

// ceil(p * mass), at least 1.
__device__ __forceinline__ uint64 share_of(double p, uint64 mass) {
  const double share = ceil(p * static_cast<double>(mass));
  return share < 1.0 ? 1 : static_cast<uint64>(share);
}

// The threshold of a source that is complete from `floor` on; it may lie below floor only when
// `everything` says that no element of weight does. False: the answer is not among its elements.
template <class Kind, class Source>
__device__ __forceinline__ bool find_threshold(const Source& source,
                                               const typename Kind::Weigher& weigher,
                                               const RowFilters& filters, bool joint, Range range,
                                               bool everything, const RowSummary& summary,
                                               SelectScratch& scratch, uint64& threshold) {
  uint64 cut = range.floor;
  bool settled = everything;
  if (filters.k > 0) {
    if (select<false>(source, weigher, range, ~uint64{0}, filters.k, scratch, cut)) {
      settled = true;
    } else if (!everything) {
      return false;
    }
  }
  if (filters.top_p < 1.0) {
    const uint64 left =
        filters.k > 0 && !joint ? mass_from(source, weigher, cut, scratch) : summary.mass;
    const Range kept{cut, range.top};
    if (select<true>(source, weigher, kept, ~uint64{0}, share_of(filters.top_p, left), scratch,
                     cut)) {
      settled = true;
    }
  }
  if (filters.min_p > 0.0) {
    const float bound = Kind::min_p_bound(summary.max, filters.min_p, filters.temperature);
    const uint64 least = source.order.last_of(key_of(fminf(bound, summary.max)));
    settled |= least >= range.floor;
    cut = cut > least ? cut : least;
  }
  threshold = cut;
  return settled;
}

}  // namespace ridgeline
