// One token of a row: the filters' threshold, then the element at which the running mass of what
// is kept, in the order of the indices, passes a random number.
//
// A block of kRowThreads threads takes a row, behind collect_candidates and, when filters may
// keep many, find_between and list_between. A top-k among the candidates is the short way
// (few.cuh), the list the other (narrow.cuh); the whole row is searched when neither is complete.
// Launch: num_rows blocks. All SMs. log_probs are of the softmax of the whole row at its
// temperature (1 for greedy rows). A row with NaN, an infinity above, or no mass gives token 0,
// valid 0 and log_prob NaN.
#pragma once

#include "common/pdl.cuh"
#include "sampling/few.cuh"
#include "sampling/narrow.cuh"
#include "sampling/plain.cuh"

namespace ridgeline {

union DrawScratch {
  SelectScratch select;
  FewScratch few;
  PlainScratch plain;
};

template <class Kind>
struct RowDraw {
  const DrawParams& params;
  uint32 row;
  uint64 random;
  const RowFilters& filters;
  const RowSummary& summary;
  typename Kind::Weigher weigher;

  // In [0, mass).
  __device__ __forceinline__ uint64 target_of(uint64 mass) const {
    return __umul64hi(random, mass);
  }
  // Writes the token. False when too many elements are as large as the k-th.
  __device__ __forceinline__ bool among_few(const CandidateSource& source, const Complete& lists,
                                            FewScratch& scratch) const {
    if (!list_largest(source, lists, key_of(summary.max), filters.k, scratch)) return false;
    uint64 least = 0;
    if (filters.min_p > 0.0) {
      const float value = Kind::min_p_bound(summary.max, filters.min_p, filters.temperature);
      least = source.order.last_of(key_of(fminf(value, summary.max)));
    }
    const FewDraw drawn = draw_of_few(source.order, weigher, filters.k, filters.top_p,
                                      params.filters.joint, summary.mass, least, random, scratch);
    if (drawn.found) {
      const float x = source.order.value(drawn.composite);
      write_drawn(params, row, {source.order.index(drawn.composite), weigher.log_weight(x)},
                  summary.mass);
    }
    return true;
  }
  __device__ __forceinline__ bool narrowed(const RowSource<typename Kind::Element>& source,
                                           SelectScratch& scratch, uint32& token) const {
    Narrowed found;
    if (!narrow<Kind>(params.scratch, row, source.vocab, source.order, weigher, filters,
                      params.filters.joint, summary, scratch, found)) {
      return false;
    }
    token = narrowed_token(source, weigher, found.cut, target_of(found.kept), scratch);
    return true;
  }
  __device__ __forceinline__ uint32 of_whole(const RowSource<typename Kind::Element>& source,
                                             SelectScratch& scratch) const {
    const Order& order = source.order;
    const Range range{order.last_of(Kind::kLeastKey), order.first_of(key_of(summary.max))};
    uint64 threshold;
    find_threshold<Kind>(source, weigher, filters, params.filters.joint, range, true, summary,
                         scratch, threshold);
    const uint64 kept = mass_from(source, weigher, threshold, scratch);
    return index_at(source, weigher, order, threshold, target_of(kept), scratch);
  }
};

template <class Kind>
__global__ void __launch_bounds__(kRowThreads, 2) draw(const __grid_constant__ DrawParams params) {
  using T = typename Kind::Element;
  __shared__ DrawScratch scratch;
  const uint32 row = blockIdx.x;
  const RowInput& input = params.input;
  const uint32 vocab = input.vocab;
  const uint32 num_segments = num_segments_of(vocab);
  const Order order{input.index_bits};
  const RowFilters filters(params.filters, row, vocab);
  const T* data = row_data<T>(input, row);
  const uint64 random = random_bits(params.keys, row, 0);
  const SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  const CandidateSource source = candidates_of(params.scratch, row, order);
  clear(scratch.few);
  pdl_wait();
  const Complete lists = complete_from(source);
  const RowSummary summary =
      summarize<Kind>(segments, num_segments, filters.rate, scratch.few.block);
  if (!summary.valid) {
    if (threadIdx.x == 0) write_invalid(params, row);
    return;
  }
  const RowDraw<Kind> job{params,  row,     random,
                          filters, summary, Kind::weigher(summary.max, filters.rate)};
  uint32 token = 0;
  if (!filters.any()) {
    token = plain_token<Kind, kRowThreads>(data, vocab, segments, filters.rate, job.weigher,
                                           job.target_of(summary.mass), scratch.plain);
  } else {
    if (lists.all && job.among_few(source, lists, scratch.few)) return;
    __syncthreads();
    const RowSource<T> whole{data, vocab, order};
    if (!job.narrowed(whole, scratch.select, token)) token = job.of_whole(whole, scratch.select);
  }
  if (threadIdx.x == 0) {
    const float log_weight = job.weigher.log_weight(to_float(data[token]));
    write_drawn(params, row, {token, log_weight}, summary.mass);
  }
}

}  // namespace ridgeline
