// softmax.cuh's function and bits, with a row in the registers of a cluster: one read, one write,
// one launch, and nothing read again.
//
// A warp holds a segment, a block kClusterSegments of them, a cluster of up to kMaxCluster blocks
// the row. Each block sends its segments' statistics to all others; one barrier later every warp
// adds them up for itself. Two blocks of different rows share an SM, so that one loads while the
// other stores. Launch: kClusterThreads threads, num_rows * cluster blocks. sm_90 on.
#pragma once

#include "common/cluster.cuh"
#include "sampling/softmax.cuh"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kClusterThreads, 2)
    softmax_sm90(const __grid_constant__ SoftmaxParams params) {
  __shared__ alignas(16) SegmentStats segments[kMaxCluster * kClusterSegments];
  static_assert(sizeof(SegmentStats) == sizeof(uint4), "one store");
  const uint32 rank = cluster_rank(), size = cluster_size();
  const RowInput& input = params.input;
  const uint32 row = blockIdx.x / size;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = rank * kClusterSegments + warp;
  cluster_arrive();
  float x[kHeld];
  load_segment<kVec>(row_data<T>(input, row), segment * kSegmentSize, input.vocab, lane, -kInfinity,
                     x);
  const float rate = softmax_rate(params.temperature, row);
  const SegmentStats stats = weigh_segment<Logits<T>>(x, rate);
  cluster_wait();
  if (lane < size) {
    const auto low = static_cast<uint32>(stats.mass);
    const auto high = static_cast<uint32>(stats.mass >> 32);
    store_in_cluster(&segments[segment], lane, {__float_as_uint(stats.max), 0, low, high});
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  const RowSummary summary = summarize<Logits<T>>(segments, num_segments_of(input.vocab), rate);
  write_segment<kVec>(x, softmax_scale<T>(summary, stats.max, rate), segment * kSegmentSize,
                      input.vocab, params.output + static_cast<int64>(row) * input.vocab);
}

}  // namespace ridgeline
