// Largest element and mass of every segment of every row: what plain draws and the softmax need.
//
// input [num_inputs, vocab] of Kind::Element; a block takes a part, a warp a segment of 1,024
// elements of each of its slices, and the next one is on the way meanwhile. The row is read once.
// Launch: kCollectThreads threads, num_rows * num_parts blocks. All SMs. kVec elements move at
// once: 16 bytes, or 1 element when the base, the row stride or vocab does not allow that.
#pragma once

#include "common/pdl.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads, kVec > 1 && kSm >= 80 ? 4 : 3)
    row_segments(const __grid_constant__ CollectParams params) {
  using T = typename Kind::Element;
  __shared__ Staging<kVec, T> staging;
  const RowInput& input = params.input;
  const uint32 num_parts = params.scratch.num_parts;
  const uint32 slices_per_part = params.scratch.slices_per_part;
  const uint32 row = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 num_segments = num_segments_of(input.vocab);
  uint32 segment = part * slices_per_part * kSegmentsPerSlice + warp;
  const uint32 part_end = (part + 1) * slices_per_part * kSegmentsPerSlice;
  const uint32 end = part_end < num_segments ? part_end : num_segments;
  if (segment >= end) return;
  const SegmentReader<kVec, T> reader{row_data<T>(input, row), input.vocab, Kind::padding(),
                                      staging};
  reader.fetch(segment * kSegmentSize);
  const float rate = softmax_rate(params.filters.temperature, row);
  SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  pdl_launch_dependents();
  for (; segment < end; segment += kSegmentsPerSlice) {
    float x[kHeld];
    reader.take(segment * kSegmentSize, x);
    if (segment + kSegmentsPerSlice < end) {
      reader.fetch((segment + kSegmentsPerSlice) * kSegmentSize);
    }
    const SegmentStats stats = segment_stats<Kind>(x, lane_max(x), rate);
    if (lane == 0) segments[segment] = stats;
  }
}

}  // namespace ridgeline
