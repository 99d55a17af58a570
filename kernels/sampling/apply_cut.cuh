// Writes what find_cut kept: probabilities over their kept sum (else 0), logits as they are (else
// -inf).
//
// input [num_inputs, vocab], output [num_rows, vocab] contiguous, both Kind::Element. A warp takes
// a segment; launch, access width and SMs as in row_segments.cuh. Rows that are not valid are
// written as if nothing was kept.
#pragma once

#include "common/pdl.cuh"
#include "sampling/order.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

template <class T>
__device__ __forceinline__ float kept_value(Logits<T>, float x, const RowCut&, float) {
  return x;
}
__device__ __forceinline__ float kept_value(Probs, float x, const RowCut& cut, float rate) {
  return x * rate * cut.scale;
}

// The power of two that the row's weights are over.
template <class T>
__device__ __forceinline__ float row_rate(Logits<T>, const SegmentStats*, uint32, uint32) {
  return 1.0f;
}
__device__ __forceinline__ float row_rate(Probs, const SegmentStats* segments, uint32 num_segments,
                                          uint32 lane) {
  float max = 0.0f;
  for (uint32 i = lane; i < num_segments; i += kWarpSize) max = fmaxf(max, segments[i].max);
  return Probs::weigher(warp_max(max), 1.0f).rate;
}

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads)
    apply_cut(const __grid_constant__ ApplyParams params) {
  using T = typename Kind::Element;
  const RowInput& input = params.input;
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 row = blockIdx.x / num_slices, slice = blockIdx.x % num_slices;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = slice * kSegmentsPerSlice + warp;
  const uint32 num_segments = num_segments_of(input.vocab);
  if (segment >= num_segments) return;
  float x[kHeld];
  load_segment<kVec>(row_data<T>(input, row), segment * kSegmentSize, input.vocab, lane,
                     Kind::padding(), x);
  pdl_wait();
  const RowCut cut = params.cuts[row];
  const SegmentStats* segments = params.segments + static_cast<int64>(row) * num_segments;
  const float rate = row_rate(Kind{}, segments, num_segments, lane);
  const Order order{input.index_bits};
  T* output = static_cast<T*>(params.output) + static_cast<int64>(row) * input.vocab;
#pragma unroll
  for (int i = 0; i < kHeld / kVec; ++i) {
    const uint32 first = segment * kSegmentSize + held_index<kVec>(i * kVec, lane);
    if (first >= input.vocab) continue;
    Vec<T, kVec> written;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float value = x[i * kVec + j];
      const bool kept = cut.valid && order.composite(value, first + j) >= cut.cut;
      written.elements[j] =
          from_float<T>(kept ? kept_value(Kind{}, value, cut, rate) : Kind::padding());
    }
    store(output + first, written);
  }
}

}  // namespace ridgeline
