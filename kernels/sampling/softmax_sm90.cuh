// softmax.cuh's function and bits, with a row in the registers of a cluster: one read, one write,
// one launch, and nothing read again.
//
// A warp holds a segment, a block kClusterSegments of them, a cluster of up to kMaxCluster blocks
// the row. Each block sends its segments' statistics to all others; one barrier later every warp
// adds them up for itself. A cluster takes some rows in succession, the next on the way to shared
// memory while it works on one. Launch: kClusterThreads threads, ceil(num_rows / rows_per_cluster)
// * cluster blocks, a Staging of dynamic shared memory. sm_90 on.
#pragma once

#include "common/cluster.cuh"
#include "sampling/softmax.cuh"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kClusterThreads, 2)
    softmax_sm90(const __grid_constant__ SoftmaxParams params) {
  using Reader = SegmentReader<kVec, T, kClusterThreads>;
  extern __shared__ __align__(16) uint8 dynamic_smem[];
  // Two rows' in turn: a block may be one barrier ahead of another.
  __shared__ alignas(16) SegmentStats stats_of[2][kMaxCluster * kClusterSegments];
  static_assert(sizeof(SegmentStats) == sizeof(uint4), "one store");
  auto& staging = *reinterpret_cast<typename Reader::Stage*>(dynamic_smem);
  const uint32 rank = cluster_rank(), size = cluster_size();
  const RowInput& input = params.input;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = rank * kClusterSegments + warp;
  const uint32 first_row = blockIdx.x / size * params.rows_per_cluster;
  const uint32 left = input.num_rows - first_row;
  const uint32 count = left < params.rows_per_cluster ? left : params.rows_per_cluster;
  const auto reader_of = [&](uint32 row) {
    return Reader{row_data<T>(input, row), input.vocab, -kInfinity, staging};
  };
  cluster_arrive();
  reader_of(first_row).fetch(segment * kSegmentSize);
  for (uint32 i = 0; i < count; ++i) {
    const uint32 row = first_row + i;
    float x[kHeld];
    reader_of(row).take(segment * kSegmentSize, x);
    if (i + 1 < count) reader_of(row + 1).fetch(segment * kSegmentSize);
    const float rate = softmax_rate(params.temperature, row);
    const SegmentStats stats = weigh_segment<Logits<T>>(x, rate);
    SegmentStats* segments = stats_of[i % 2];
    if (i == 0) cluster_wait();
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
}

}  // namespace ridgeline
