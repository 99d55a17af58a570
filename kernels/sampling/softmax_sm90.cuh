// softmax.cuh's function and bits, with rows in the registers of clusters: one read, one write, one
// launch, and nothing read again.
//
// A warp holds a segment, a block kClusterSegments of them, a cluster of up to kMaxCluster blocks a
// row; clusters take rows in turn. While a warp weighs and stores its segment of one row, that of
// the next row comes to shared memory. Each warp sends its segment's statistics to all blocks, and
// the first of each block adds up all that have come. Two blocks of different rows share an SM, so
// that one computes while the other waits. Launch: kClusterThreads threads, at most as many
// clusters as the GPU holds at once; dynamic shared memory for a block's segments. sm_90 on.
#pragma once

#include "common/cluster.cuh"
#include "common/opaque.cuh"
#include "sampling/softmax.cuh"

namespace ridgeline {

// Rows of a cluster from which on L2 is told what to keep. Measured on an H200: 512 rows of 128,256
// take 130.9 us for it and for stores that L2 passes on, else 134.6; but 64 rows 1% longer.
constexpr uint32 kManyTurns = 8;

// Where a warp's next segment comes to.
template <class T>
struct SegmentStage {
  T* elements;  // [kSegmentSize]
  Arrival* arrival;
  bool keeps;  // with many rows: what is on its way, in L2

  // Starts the copy of elements [first, first + kSegmentSize) of a row, as far as they exist.
  __device__ __forceinline__ void fetch(const T* row, uint32 first, uint32 vocab) const {
    const uint32 left = first < vocab ? vocab - first : 0;
    const uint32 count = left < kSegmentSize ? left : kSegmentSize;
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      if (keeps) {
        bulk_copy_kept(elements, row + first, count * sizeof(T), *arrival);
      } else {
        bulk_copy(elements, row + first, count * sizeof(T), *arrival);
      }
    }
    __syncwarp();
  }
  // As load_segment, of what fetch() number `round` was of.
  template <int kVec>
  __device__ __forceinline__ void take(uint32 round, uint32 first, uint32 vocab, uint32 lane,
                                       float padding, float (&x)[kHeld]) const {
    arrival->wait(round);
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
  // Two rows' in turn: a block may be a row ahead of another.
  __shared__ alignas(16) SegmentStats segments[2][kMaxCluster * kClusterSegments];
  static_assert(sizeof(SegmentStats) == sizeof(uint4), "one store");
  __shared__ float row_max, row_scale;
  __shared__ Arrival fetched[kClusterSegments], sent[2], summed;
  const RowInput& input = params.input;
  const uint32 size = cluster_size(), num_clusters = gridDim.x / size;
  // Why a shuffle: so the compiler knows that a warp's lanes agree.
  const uint32 warp = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
  const uint32 segment = cluster_rank() * kClusterSegments + warp;
  const uint32 first = segment * kSegmentSize;
  const SegmentStage<T> stage{reinterpret_cast<T*>(staged) + warp * kSegmentSize, fetched + warp,
                              input.num_rows >= kManyTurns * num_clusters};
  if (threadIdx.x % kWarpSize == 0) stage.arrival->init();
  if (threadIdx.x == 0) {
    sent[0].init();
    sent[1].init();
    summed.init();
  }
  uint32 next = blockIdx.x / size;
  stage.fetch(row_data<T>(input, next), first, input.vocab);
  cluster_arrive();
  cluster_wait();
#pragma unroll 1
  for (uint32 turn = 0; next < input.num_rows; ++turn) {
    // Why opaque: what these lead to costs less to compute again than registers to keep.
    const uint32 row = static_cast<uint32>(opaque(static_cast<int>(next)));
    const uint32 lane = static_cast<uint32>(opaque(static_cast<int>(threadIdx.x))) % kWarpSize;
    next += num_clusters;
    SegmentStats* of_row = segments[turn % 2];
    Arrival& of_cluster = sent[turn % 2];
    if (threadIdx.x == 0) of_cluster.expect(size * kClusterSegments * sizeof(SegmentStats));
    float x[kHeld];
    stage.template take<kVec>(turn, first, input.vocab, lane, -kInfinity, x);
    if (next < input.num_rows) {
      stage.fetch(row_data<T>(input, row + num_clusters), first, input.vocab);
    }
    const float rate = softmax_rate(params.temperature, row);
    const SegmentStats stats = weigh_segment<Logits<T>>(x, rate);
    if (lane < size) {
      const auto low = static_cast<uint32>(stats.mass);
      const auto high = static_cast<uint32>(stats.mass >> 32);
      send_in_cluster(&of_row[segment], of_cluster, lane,
                      {__float_as_uint(stats.max), 0, low, high});
    }
    __syncwarp();
    if (warp == 0) {
      of_cluster.wait_for_cluster(turn / 2);
      const RowSummary summary = summarize<Logits<T>>(of_row, num_segments_of(input.vocab), rate);
      if (lane == 0) {
        // All warps have read those of the row before: they have sent their statistics of this one.
        row_max = summary.max;
        row_scale = softmax_scale(summary);
        summed.arrive();
      }
      __syncwarp();
    }
    summed.wait(turn);
    const float scale = softmax_scale<T>(row_scale, row_max, stats.max, rate);
    write_segment<kVec, true>(x, scale, first, input.vocab,
                              params.output + static_cast<int64>(row) * input.vocab);
  }
}

}  // namespace ridgeline
