// softmax.cuh's function and bits, with rows in the registers of clusters: one read, one write, one
// launch, and nothing read again.
//
// A warp holds a segment, a block kClusterSegments of them, a cluster of up to kMaxCluster blocks a
// row; clusters take rows in turn. While a warp weighs and stores its segment of one row, that of
// the next row comes to shared memory. Each warp sends its segment's statistics to all blocks, and
// adds up all that have come to its own. Two blocks of different rows share an SM, so that one
// computes while the other waits. Launch: kClusterThreads threads, at most as many clusters as the
// GPU holds at once; dynamic shared memory for a block's segments. sm_90 on.
#pragma once

#include "common/cluster.cuh"
#include "common/cp_async.cuh"
#include "common/opaque.cuh"
#include "sampling/softmax.cuh"

namespace ridgeline {

// A warp's next segment, on its way to shared memory.
template <class T>
struct SegmentStage {
  static constexpr int kPiece = 16 / sizeof(T);
  T* elements;  // [kSegmentSize]

  // Starts the copy of elements [first, first + kSegmentSize) of a row, as far as they exist.
  __device__ __forceinline__ void fetch(const T* row, uint32 first, uint32 vocab) const {
    const uint32 mine = threadIdx.x % kWarpSize * kPiece;
    const auto to = static_cast<uint32>(__cvta_generic_to_shared(elements + mine));
    const T* from = row + first + mine;
    const bool whole = first + kSegmentSize <= vocab;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHeld / kPiece; ++i) {
      constexpr int kStep = kWarpSize * kPiece;
      if (!whole && first + mine + i * kStep >= vocab) continue;
      cp_async_16(to + i * kWarpSize * 16, from + i * kStep, true);
    }
    cp_async_commit();
  }
  // As load_segment, of what the last fetch() was of.
  template <int kVec>
  __device__ __forceinline__ void take(uint32 first, uint32 vocab, uint32 lane, float padding,
                                       float (&x)[kHeld]) const {
    cp_async_wait<0>();
    __syncwarp();
    Vec<T, kVec> fetched[kHeld / kVec];
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      fetched[i] = load<kVec>(elements + lane * kVec + i * kWarpSize * kVec);
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) x[j] = to_float(fetched[j / kVec].elements[j % kVec]);
    if (first + kSegmentSize <= vocab) return;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (first + held_index<kVec>(j, lane) >= vocab) x[j] = padding;
    }
  }
};

template <class T, int kVec>
__global__ void __launch_bounds__(kClusterThreads, 2)
    softmax_sm90(const __grid_constant__ SoftmaxParams params) {
  extern __shared__ __align__(16) uint8 staged[];  // [kClusterSegments, kSegmentSize] of T
  // Two rows' in turn: a warp may be a row ahead of others.
  __shared__ alignas(16) SegmentStats segments[2][kMaxCluster * kClusterSegments];
  __shared__ Arrival arrivals[2];
  static_assert(sizeof(SegmentStats) == sizeof(uint4), "one store");
  const RowInput& input = params.input;
  const uint32 size = cluster_size(), num_clusters = gridDim.x / size;
  const uint32 warp = threadIdx.x / kWarpSize;
  const uint32 segment = cluster_rank() * kClusterSegments + warp;
  const uint32 first = segment * kSegmentSize;
  const SegmentStage<T> stage{reinterpret_cast<T*>(staged) + warp * kSegmentSize};
  uint32 next = blockIdx.x / size;
  stage.fetch(row_data<T>(input, next), first, input.vocab);
  if (threadIdx.x == 0) {
    arrivals[0].init();
    arrivals[1].init();
  }
  cluster_arrive();
  cluster_wait();
#pragma unroll 1
  for (uint32 turn = 0; next < input.num_rows; ++turn) {
    // Why opaque: what these lead to costs less to compute again than registers to keep.
    const uint32 row = static_cast<uint32>(opaque(static_cast<int>(next)));
    const uint32 lane = static_cast<uint32>(opaque(static_cast<int>(threadIdx.x))) % kWarpSize;
    next += num_clusters;
    SegmentStats* of_row = segments[turn % 2];
    Arrival& arrival = arrivals[turn % 2];
    if (threadIdx.x == 0) arrival.expect(size * kClusterSegments * sizeof(SegmentStats));
    float x[kHeld];
    stage.template take<kVec>(first, input.vocab, lane, -kInfinity, x);
    if (next < input.num_rows) {
      stage.fetch(row_data<T>(input, row + num_clusters), first, input.vocab);
    }
    const float rate = softmax_rate(params.temperature, row);
    const SegmentStats stats = weigh_segment<Logits<T>>(x, rate);
    if (lane < size) {
      const auto low = static_cast<uint32>(stats.mass);
      const auto high = static_cast<uint32>(stats.mass >> 32);
      send_in_cluster(&of_row[segment], arrival, lane, {__float_as_uint(stats.max), 0, low, high});
    }
    __syncwarp();
    arrival.wait(turn / 2);
    const RowSummary summary = summarize<Logits<T>>(of_row, num_segments_of(input.vocab), rate);
    write_segment<kVec>(x, softmax_scale<T>(summary, stats.max, rate), first, input.vocab,
                        params.output + static_cast<int64>(row) * input.vocab);
  }
}

}  // namespace ridgeline
