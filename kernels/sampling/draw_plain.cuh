// One token of a row that nothing filters, or that is greedy.
//
// A block of kPlainThreads threads takes a row, behind row_segments: it walks the segments' masses,
// or maxima, and reads one segment again. Launch: num_rows blocks. All SMs. Results as in draw.cuh.
#pragma once

#include "common/pdl.cuh"
#include "sampling/plain.cuh"

namespace ridgeline {

template <class Kind>
__global__ void __launch_bounds__(kPlainThreads)
    draw_plain(const __grid_constant__ DrawParams params) {
  __shared__ PlainScratch scratch;
  const uint32 row = blockIdx.x;
  const RowInput& input = params.input;
  const uint32 num_segments = num_segments_of(input.vocab);
  const typename Kind::Element* data = row_data<typename Kind::Element>(input, row);
  const RowFilters filters(params.filters, row, input.vocab);
  const float rate = filters.rate;
  const uint64 random = random_bits(params.keys, row, 0);
  const SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  pdl_wait();
  const RowSummary summary = summarize<Kind>(segments, num_segments, rate, scratch.block);
  if (!summary.valid) {
    if (threadIdx.x == 0) write_invalid(params, row);
    return;
  }
  const typename Kind::Weigher weigher = Kind::weigher(summary.max, rate);
  const uint32 token =
      filters.any()
          ? greedy_token<Kind, kPlainThreads>(data, input.vocab, segments, summary.max, scratch)
          : plain_token<Kind, kPlainThreads>(data, input.vocab, segments, rate, weigher,
                                             __umul64hi(random, summary.mass), scratch);
  if (threadIdx.x == 0) {
    write_drawn(params, row, {token, weigher.log_weight(to_float(data[token]))}, summary.mass);
  }
}

}  // namespace ridgeline
