// Largest element and mass of every segment of every row: what plain and greedy draws and the
// softmax need.
//
// input [num_inputs, vocab] of Kind::Element; a warp takes a segment of 1,024 elements and reads it
// once. Launch: kCollectThreads threads, num_rows * num_slices blocks. All SMs. kVec elements move
// at once: 16 bytes, or 1 element when the base, the row stride or vocab does not allow that.
#pragma once

#include "common/pdl.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads)
    row_segments(const __grid_constant__ CollectParams params) {
  const RowInput& input = params.input;
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 row = blockIdx.x / num_slices, slice = blockIdx.x % num_slices;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = slice * kSegmentsPerSlice + warp;
  const uint32 num_segments = num_segments_of(input.vocab);
  if (segment >= num_segments) return;
  float x[kHeld];
  load_segment<kVec>(row_data<typename Kind::Element>(input, row), segment * kSegmentSize,
                     input.vocab, lane, Kind::padding(), x);
  const float rate = softmax_rate(params.filters.temperature, row, params.draws);
  pdl_launch_dependents();
  const SegmentStats stats = segment_stats<Kind>(x, lane_max(x), rate);
  if (lane == 0) {
    params.scratch.segments[static_cast<int64>(row) * num_segments + segment] = stats;
  }
}

}  // namespace ridgeline
