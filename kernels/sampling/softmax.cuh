// output = exp((x - max) / temperature) / sum over the last dimension; float32 inside and out.
//
// input [num_inputs, vocab] of T, output [num_rows, vocab] contiguous. Two ways of the same bits,
// both on the segments of rows.cuh:
// - softmax: a block of kSoftmaxThreads threads takes a row, keeps num_held segments in shared
//   memory (4 KB each) and reads the others again, from L2. For many rows. Launch: num_rows blocks.
// - softmax_slices: behind row_segments, a warp takes a segment. For few rows. Launch as
//   row_segments.
// Temperature 0 divides the mass among the largest elements. A row with NaN, an infinity above, or
// nothing above -inf is NaN throughout. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "sampling/block.cuh"

namespace ridgeline {

constexpr uint32 kMaxSegmentsInSmem = 320;  // their stats; a longer row is left to softmax_slices

template <int kVec>
__device__ __forceinline__ void write_segment(const float (&x)[kHeld], uint32 first, uint32 vocab,
                                              uint32 lane, const LogitWeigher& weigher, float scale,
                                              float* output) {
  // Pieces of 16 bytes: kVec elements of T may be 32 bytes of output.
  constexpr int kPiece = kVec < 4 ? kVec : 4;
#pragma unroll
  for (int i = 0; i < kHeld / kPiece; ++i) {
    const uint32 index = first + held_index<kVec>(i * kPiece, lane);
    if (index >= vocab) continue;
    Vec<float, kPiece> y;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) y.elements[j] = weigher.weight(x[i * kPiece + j]) * scale;
    store(output + index, y);
  }
}

__device__ __forceinline__ float softmax_scale(const RowSummary& summary) {
  return summary.valid ? static_cast<float>(0x1p42 / static_cast<double>(summary.mass))
                       : __uint_as_float(0x7fffffffu);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax(const __grid_constant__ SoftmaxParams params) {
  extern __shared__ __align__(16) float held[];  // [num_held, kHeld, 32]
  __shared__ SegmentStats segments[kMaxSegmentsInSmem];
  const RowInput& input = params.input;
  const uint32 row = blockIdx.x, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr uint32 kWarps = kSoftmaxThreads / kWarpSize;
  const uint32 num_segments = num_segments_of(input.vocab);
  const T* data = row_data<T>(input, row);
  const float rate = softmax_rate(params.temperature, row);
  float x[kHeld];
  for (uint32 segment = warp; segment < num_segments; segment += kWarps) {
    load_segment<kVec>(data, segment * kSegmentSize, input.vocab, lane, -kInfinity, x);
    if (segment < params.num_held) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) held[segment * kSegmentSize + j * kWarpSize + lane] = x[j];
    }
    const SegmentStats stats = segment_stats<Logits<T>>(x, rate);
    if (lane == 0) segments[segment] = stats;
  }
  __syncthreads();
  const RowSummary summary = summarize<Logits<T>>(segments, num_segments, rate);
  const LogitWeigher weigher = Logits<T>::weigher(summary.max, rate);
  const float scale = softmax_scale(summary);
  float* output = params.output + static_cast<int64>(row) * input.vocab;
  for (uint32 segment = warp; segment < num_segments; segment += kWarps) {
    if (segment < params.num_held) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) x[j] = held[segment * kSegmentSize + j * kWarpSize + lane];
    } else {
      load_segment<kVec>(data, segment * kSegmentSize, input.vocab, lane, -kInfinity, x);
    }
    write_segment<kVec>(x, segment * kSegmentSize, input.vocab, lane, weigher, scale, output);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kCollectThreads)
    softmax_slices(const __grid_constant__ SoftmaxParams params) {
  const RowInput& input = params.input;
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 row = blockIdx.x / num_slices, slice = blockIdx.x % num_slices;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 first = (slice * kSegmentsPerSlice + warp) * kSegmentSize;
  const uint32 num_segments = num_segments_of(input.vocab);
  float x[kHeld];
  load_segment<kVec>(row_data<T>(input, row), first, input.vocab, lane, -kInfinity, x);
  const float rate = softmax_rate(params.temperature, row);
  pdl_wait();
  const RowSummary summary = summarize<Logits<T>>(
      params.segments + static_cast<int64>(row) * num_segments, num_segments, rate);
  write_segment<kVec>(x, first, input.vocab, lane, Logits<T>::weigher(summary.max, rate),
                      softmax_scale(summary),
                      params.output + static_cast<int64>(row) * input.vocab);
}

}  // namespace ridgeline
