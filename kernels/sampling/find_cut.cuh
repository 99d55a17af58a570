// The filters' threshold of a row, for the kernels that write what it keeps.
//
// Launch, ownership and sources as in draw.cuh. With count_only, top-k counts all elements, also
// those without weight, in the order of order.cuh (NaN first), and no row is invalid.
#pragma once

#include "common/pdl.cuh"
#include "sampling/narrow.cuh"

namespace ridgeline {

template <class Kind>
__device__ __forceinline__ RowCut weighed_cut(const CutParams& params, uint32 row,
                                              const RowFilters& filters, const RowSummary& summary,
                                              SelectScratch& scratch) {
  using T = typename Kind::Element;
  const Order order{params.input.index_bits};
  const typename Kind::Weigher weigher = Kind::weigher(summary.max, filters.rate);
  const uint64 top = order.first_of(key_of(summary.max));
  const bool joint = params.filters.joint;
  if (!summary.valid) return {~uint64{0}, 0.0f, 0};
  uint64 cut = order.last_of(Kind::kLeastKey);
  uint64 kept = summary.mass;
  const auto find = [&](const auto& source, uint32 least_key) {
    const Range range{order.last_of(least_key), top};
    if (!find_threshold<Kind>(source, weigher, filters, joint, range, least_key <= Kind::kLeastKey,
                              summary, scratch, cut)) {
      return false;
    }
    kept = mass_from(source, weigher, cut, scratch);
    return true;
  };
  if (filters.any()) {
    const CandidateSource source = candidates_of(params.scratch, row, order);
    const Complete lists = complete_from(source);
    if (!lists.all || !find(source, lists.bound)) {
      const uint32 vocab = params.input.vocab;
      Narrowed found;
      if (narrow<Kind>(params.scratch, row, vocab, order, weigher, filters, joint, summary, scratch,
                       found)) {
        cut = found.cut;
        kept = found.kept;
      } else {
        find(RowSource<T>{row_data<T>(params.input, row), vocab, order}, Kind::kLeastKey);
      }
    }
  }
  const float scale = static_cast<float>(0x1p42 / static_cast<double>(kept));
  return {cut, scale, 1};
}

template <class Kind>
__device__ __forceinline__ RowCut counted_cut(const CutParams& params, uint32 row, uint32 k,
                                              const typename Kind::Weigher& weigher,
                                              SelectScratch& scratch) {
  using T = typename Kind::Element;
  const Order order{params.input.index_bits};
  uint64 cut = 0;
  if (k == 0) return {cut, 1.0f, 1};
  const CandidateSource source = candidates_of(params.scratch, row, order);
  const uint64 top = order.first_of(0xffffffffu);
  const Complete lists = complete_from(source);
  if (!lists.all || !select<false>(source, weigher, Range{order.last_of(lists.bound), top},
                                   ~uint64{0}, k, scratch, cut)) {
    const RowSource<T> whole{row_data<T>(params.input, row), params.input.vocab, order};
    select<false>(whole, weigher, Range{0, top}, ~uint64{0}, k, scratch, cut);
  }
  return {cut, 1.0f, 1};
}

template <class Kind>
__global__ void __launch_bounds__(kRowThreads, 2)
    find_cut(const __grid_constant__ CutParams params) {
  __shared__ SelectScratch scratch;
  const uint32 row = blockIdx.x;
  const uint32 num_segments = num_segments_of(params.input.vocab);
  pdl_wait();
  const RowFilters filters(params.filters, row, params.input.vocab);
  RowCut cut;
  if (params.count_only) {
    cut = counted_cut<Kind>(params, row, filters.k, Kind::weigher(0.0f, filters.rate), scratch);
  } else {
    const SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
    const RowSummary summary = summarize<Kind>(segments, num_segments, filters.rate, scratch.block);
    cut = weighed_cut<Kind>(params, row, filters, summary, scratch);
  }
  pdl_launch_dependents();
  if (threadIdx.x == 0) params.scratch.cuts[row] = cut;
}

}  // namespace ridgeline
