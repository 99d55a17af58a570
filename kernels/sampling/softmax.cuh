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

// Of weights relative to their segment's largest element; `scale` makes them probabilities.
template <int kVec, bool kThrough = false>
__device__ __forceinline__ void write_segment(const float (&weights)[kHeld], float scale,
                                              uint32 first, uint32 vocab, float* output) {
  // Pieces of 16 bytes: kVec elements of T may be 32 bytes of output.
  constexpr int kPiece = kVec < 4 ? kVec : 4;
  const uint32 lane = threadIdx.x % kWarpSize;
  float* mine = output + first + lane * kVec;
  constexpr int kStep = kWarpSize * kVec;
  const auto offset_of = [](int i) { return i * kPiece / kVec * kStep + i * kPiece % kVec; };
  const auto write = [&](int i) {
    Vec<float, kPiece> y;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) y.elements[j] = weights[i * kPiece + j] * scale;
    if constexpr (kThrough) {
      store_through(mine + offset_of(i), y);
    } else {
      store_once(mine + offset_of(i), y);
    }
  };
  // Why apart: to check every piece takes a fifth of the softmax's instructions.
  if (first + kSegmentSize <= vocab) {
#pragma unroll
    for (int i = 0; i < kHeld / kPiece; ++i) write(i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kHeld / kPiece; ++i) {
    if (first + lane * kVec + offset_of(i) < vocab) write(i);
  }
}

// Puts the weights in the elements' place.
template <class T>
__device__ __forceinline__ void weigh(float (&x)[kHeld], float segment_max, float rate) {
  const LogitWeigher weigher = Logits<T>::weigher(segment_max, rate);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) x[j] = weigher.weight(x[j]);
}

// What makes probabilities of weights: of those relative to the row's largest element,
__device__ __forceinline__ float softmax_scale(const RowSummary& row) {
  if (!row.valid) return __uint_as_float(0x7fffffffu);
  return static_cast<float>(0x1p42 / static_cast<double>(row.mass));
}

// and of those relative to a segment's.
template <class T>
__device__ __forceinline__ float softmax_scale(float row_scale, float row_max, float segment_max,
                                               float rate) {
  using Kind = Logits<T>;
  return Kind::weigher(segment_max, rate).scale_in(Kind::weigher(row_max, rate)) * row_scale;
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
    const SegmentStats stats = weigh_segment<Logits<T>>(x, rate);
    if (lane == 0) segments[segment] = stats;
    if (segment >= params.num_held) continue;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) held[segment * kSegmentSize + j * kWarpSize + lane] = x[j];
  }
  __syncthreads();
  const RowSummary summary = summarize<Logits<T>>(segments, num_segments, rate);
  const float scale = softmax_scale(summary);
  float* output = params.output + static_cast<int64>(row) * input.vocab;
  for (uint32 segment = warp; segment < num_segments; segment += kWarps) {
    const float max = segments[segment].max;
    if (segment < params.num_held) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) x[j] = held[segment * kSegmentSize + j * kWarpSize + lane];
    } else {
      load_segment<kVec>(data, segment * kSegmentSize, input.vocab, lane, -kInfinity, x);
      weigh<T>(x, max, rate);
    }
    write_segment<kVec>(x, softmax_scale<T>(scale, summary.max, max, rate), segment * kSegmentSize,
                        input.vocab, output);
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
  if (first >= input.vocab) return;
  const SegmentStats* segments = params.segments + static_cast<int64>(row) * num_segments;
  const RowSummary summary = summarize<Logits<T>>(segments, num_segments, rate);
  const float max = segments[first / kSegmentSize].max;
  weigh<T>(x, max, rate);
  const float scale = softmax_scale<T>(softmax_scale(summary), summary.max, max, rate);
  write_segment<kVec>(x, scale, first, input.vocab,
                      params.output + static_cast<int64>(row) * input.vocab);
}

}  // namespace ridgeline
