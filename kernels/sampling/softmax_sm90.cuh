// softmax.cuh's function and bits, with a row in the registers of a cluster: one read, one write,
// one launch, and nothing read again.
//
// A warp holds a segment, a block kClusterSegments of them, a cluster of up to kMaxCluster blocks
// the row. Each block sends its segments' statistics to all others; one barrier later every warp
// adds them up for itself. Two blocks of different rows share an SM, so that one loads while the
// other stores. Launch: kClusterThreads threads, num_rows * cluster blocks, a Staging of dynamic
// shared memory. sm_90 on.
#pragma once

#include "common/cluster.cuh"
#include "common/cp_async.cuh"
#include "common/ldmatrix.cuh"
#include "sampling/softmax.cuh"

namespace ridgeline {

// Shared memory through which a block loads its segments: 4% faster than straight into registers.
// Every thread reads back only what it has asked for itself, so that no barrier is needed.
template <int kVec, class T>
struct Staging {
  uint4 chunks[kHeld / kVec][kClusterThreads];

  // A warp's segment, which take() returns; from `vocab` on there is only padding.
  __device__ __forceinline__ void fetch(const T* row, uint32 first, uint32 vocab) {
    const uint32 lane = threadIdx.x % kWarpSize;
    const uint32 to = shared_address(&chunks[0][threadIdx.x]);
    const T* mine = row + first + lane * kVec;
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      if (first + kSegmentSize <= vocab || first + (i * kWarpSize + lane) * kVec < vocab) {
        cp_async_16(to + i * sizeof(chunks[0]), mine + i * kWarpSize * kVec, true);
      } else {
        Vec<T, kVec> padding;
#pragma unroll
        for (int j = 0; j < kVec; ++j) padding.elements[j] = from_float<T>(-kInfinity);
        chunks[i][threadIdx.x] = padding.words[0];
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void take(float (&x)[kHeld]) const {
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kHeld / kVec; ++i) {
      Vec<T, kVec> chunk;
      chunk.words[0] = chunks[i][threadIdx.x];
#pragma unroll
      for (int j = 0; j < kVec; ++j) x[i * kVec + j] = to_float(chunk.elements[j]);
    }
  }
};

template <class T, int kVec>
__global__ void __launch_bounds__(kClusterThreads, 2)
    softmax_sm90(const __grid_constant__ SoftmaxParams params) {
  extern __shared__ __align__(16) uint8 dynamic_smem[];
  __shared__ alignas(16) SegmentStats segments[kMaxCluster * kClusterSegments];
  static_assert(sizeof(SegmentStats) == sizeof(uint4), "one store");
  const uint32 rank = cluster_rank(), size = cluster_size();
  const RowInput& input = params.input;
  const uint32 row = blockIdx.x / size;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = rank * kClusterSegments + warp;
  cluster_arrive();
  auto& staging = *reinterpret_cast<Staging<kVec, T>*>(dynamic_smem);
  staging.fetch(row_data<T>(input, row), segment * kSegmentSize, input.vocab);
  float x[kHeld];
  staging.take(x);
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
