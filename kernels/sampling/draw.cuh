// One token of a row: the filters' threshold, then the element at which the running mass of what
// is kept, in the order of the indices, passes a random number.
//
// A block of kRowThreads threads takes a row, behind row_segments or collect_candidates. Without
// filters it walks the segments' masses and reads one segment again; with filters it works on the
// candidates, and on the whole row (narrow.cuh) only when they do not hold the answer. Launch:
// num_rows blocks. All SMs. log_probs are of the softmax of the whole row at its temperature (1 for
// greedy rows). A row with NaN, an infinity above, or no mass gives token 0, valid 0 and log_prob
// NaN.
#pragma once

#include "common/pdl.cuh"
#include "sampling/narrow.cuh"
#include "sampling/philox.cuh"

namespace ridgeline {

// target in [0, mass): the token of an unfiltered row.
template <class Kind>
__device__ __forceinline__ uint32 plain_token(const typename Kind::Element* data, uint32 vocab,
                                              const SegmentStats* segments, float rate,
                                              const typename Kind::Weigher& weigher, uint64 target,
                                              SelectScratch& scratch) {
  const uint32 num_segments = num_segments_of(vocab);
  const uint32 share = (num_segments + kRowThreads - 1) / kRowThreads;
  const uint32 first = threadIdx.x * share;
  const auto mass_in_row = [&](uint32 i) -> uint64 {
    if (i >= num_segments) return 0;
    return scaled_mass(segments[i].mass, Kind::weigher(segments[i].max, rate).scale_in(weigher));
  };
  uint64 mine = 0;
  for (uint32 i = 0; i < share; ++i) mine += mass_in_row(first + i);
  uint64 before = sum_before(mine, scratch.block);
  if (before <= target && target < before + mine) {
    uint32 i = first;
    while (before + mass_in_row(i) <= target) before += mass_in_row(i++);
    // The rest of the target, in the segment's own unit.
    const SegmentStats stats = segments[i];
    const float scale = Kind::weigher(stats.max, rate).scale_in(weigher);
    const uint64 rest = static_cast<uint64>(static_cast<double>(target - before) / scale);
    scratch.bin = i;
    scratch.rest = rest < stats.mass ? rest : stats.mass - 1;
  }
  __syncthreads();
  const uint32 segment = scratch.bin;
  target = scratch.rest;
  __syncthreads();

  // Two neighbours a thread.
  static_assert(kSegmentSize == 2 * kRowThreads, "a thread takes two elements");
  const typename Kind::Weigher own = Kind::weigher(segments[segment].max, rate);
  const uint32 index = segment * kSegmentSize + threadIdx.x * 2;
  const auto mass_at = [&](uint32 i) -> uint64 {
    return i < vocab ? mass_of(own.weight(to_float(data[i]))) : 0;
  };
  const uint64 mass = mass_at(index);
  mine = mass + mass_at(index + 1);
  before = sum_before(mine, scratch.block);
  if (before <= target && target < before + mine) {
    scratch.bin = target < before + mass ? index : index + 1;
  }
  __syncthreads();
  return scratch.bin;
}

template <class Kind>
struct RowDraw {
  const DrawParams& params;
  uint32 row;
  const typename Kind::Element* data;
  RowFilters filters;
  RowSummary summary;
  typename Kind::Weigher weigher;

  // In [0, mass).
  __device__ __forceinline__ uint64 target_of(uint64 mass) const {
    return __umul64hi(random_bits(params.keys, row, 0), mass);
  }
  template <class Source>
  __device__ __forceinline__ bool from(const Source& source, uint32 least_key,
                                       SelectScratch& scratch, uint32& token) const {
    const Range range{source.order.last_of(least_key), source.order.first_of(key_of(summary.max))};
    uint64 threshold;
    if (!find_threshold<Kind>(source, weigher, filters, params.filters.joint, range,
                              least_key <= Kind::kLeastKey, summary, scratch, threshold)) {
      return false;
    }
    const uint64 kept = mass_from(source, weigher, threshold, scratch);
    token = index_at(source, weigher, source.order, threshold, target_of(kept), scratch);
    return true;
  }
  __device__ __forceinline__ bool narrowed(const RowSource<typename Kind::Element>& source,
                                           SelectScratch& scratch, uint32& token) const {
    Narrowed found;
    if (!narrow<Kind>(source, weigher, filters, params.filters.joint, summary,
                      list_of(params.scratch, row, source.vocab), list_capacity(source.vocab),
                      scratch, found)) {
      return false;
    }
    token = narrowed_token(source, weigher, found.cut, target_of(found.kept), scratch);
    return true;
  }
};

template <class Kind>
__global__ void __launch_bounds__(kRowThreads, 2) draw(const __grid_constant__ DrawParams params) {
  using T = typename Kind::Element;
  __shared__ SelectScratch scratch;
  const uint32 row = blockIdx.x;
  const RowInput& input = params.input;
  const uint32 num_segments = num_segments_of(input.vocab);
  const Order order{input.index_bits};
  pdl_wait();
  const RowFilters filters(params.filters, row, input.vocab);
  const SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  const RowSummary summary = summarize<Kind>(segments, num_segments, filters.rate, scratch.block);
  if (!summary.valid) {
    if (threadIdx.x == 0) {
      params.tokens[row] = 0;
      params.valid[row] = 0;
      params.log_probs[row] = __uint_as_float(0x7fffffffu);
    }
    return;
  }
  const RowDraw<Kind> job{params,  row,     row_data<T>(input, row),
                          filters, summary, Kind::weigher(summary.max, filters.rate)};
  uint32 token = 0;
  if (!filters.any()) {
    token = plain_token<Kind>(job.data, input.vocab, segments, filters.rate, job.weigher,
                              job.target_of(summary.mass), scratch);
  } else {
    const CandidateSource source = candidates_of(params.scratch, row, input.vocab, order);
    uint32 bound;
    if (!complete_from(source, bound, scratch.block) || !job.from(source, bound, scratch, token)) {
      const RowSource<T> whole{job.data, input.vocab, order};
      if (!job.narrowed(whole, scratch, token)) job.from(whole, Kind::kLeastKey, scratch, token);
    }
  }
  if (threadIdx.x == 0) {
    const float x = to_float(job.data[token]);
    const float log_mass = log2f(static_cast<float>(summary.mass)) - kMassBits;
    params.tokens[row] = static_cast<int32>(token);
    params.valid[row] = 1;
    params.log_probs[row] = (job.weigher.log_weight(x) - log_mass) * kLn2;
  }
}

}  // namespace ridgeline
