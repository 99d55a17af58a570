// packbits of each segment x[indptr[s]] to x[indptr[s + 1] - 1] by itself: its bytes begin at
// packed[new_indptr[s]], and new_indptr[s + 1] - new_indptr[s] = ceil(length / 8).
//
// Two kernels. segment_offsets: one block, the running sum of the segments' bytes.
// segment_packbits: a warp owns kPackRounds groups of 4 bytes; lane l looks at bit l of a group,
// and a vote of the warp is the 4 bytes. Bytes past the last segment are 0. x of any stride.
// Whatever indptr holds, segments are cut to x and new_indptr is monotonic and at most num_bytes.
// All SMs.
#pragma once

#include "common/reduce.cuh"
#include "quantization/params.h"

namespace ridgeline {

struct Segment {
  uint32 begin;  // bits
  uint32 end;    // at least begin
};

__device__ __forceinline__ Segment segment_at(const SegmentPackbitsParams& params, uint32 segment) {
  const int32 first = params.indptr[segment], last = params.indptr[segment + 1];
  const uint32 begin = min(static_cast<uint32>(max(first, 0)), params.num_bits);
  return {begin, min(max(static_cast<uint32>(max(last, 0)), begin), params.num_bits)};
}

// x plus those of the lanes before.
__device__ __forceinline__ int64 warp_prefix_sum(int64 x) {
  const uint32 lane = threadIdx.x % kWarpSize;
  for (uint32 offset = 1; offset < kWarpSize; offset *= 2) {
    const int64 other = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

__global__ void __launch_bounds__(kScanThreads)
    segment_offsets(const __grid_constant__ SegmentPackbitsParams params) {
  __shared__ int64 warp_sums[kScanThreads / kWarpSize];
  const uint32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64 before = 0;  // bytes of the segments of earlier rounds
  if (threadIdx.x == 0) params.new_indptr[0] = 0;
  for (uint32 first = 0; first < params.num_segments; first += kScanThreads) {
    const uint32 segment = first + threadIdx.x;
    int64 sum = 0;
    if (segment < params.num_segments) {
      const Segment bits = segment_at(params, segment);
      sum = (bits.end - bits.begin + 7) / 8;
    }
    sum = warp_prefix_sum(sum);
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = warp_prefix_sum(warp_sums[lane]);
    __syncthreads();
    if (warp > 0) sum += warp_sums[warp - 1];
    sum += before;
    if (segment < params.num_segments) {
      params.new_indptr[segment + 1] = static_cast<int32>(min(sum, int64{params.num_bytes}));
    }
    before += warp_sums[kScanThreads / kWarpSize - 1];
    __syncthreads();
  }
}

// The last segment that begins at or before a byte.
__device__ __forceinline__ uint32 segment_of(const SegmentPackbitsParams& params, uint32 byte) {
  uint32 segment = 0, after = params.num_segments;
  while (after - segment > 1) {
    const uint32 middle = segment + (after - segment) / 2;
    if (static_cast<uint32>(params.new_indptr[middle]) <= byte) {
      segment = middle;
    } else {
      after = middle;
    }
  }
  return segment;
}

__global__ void __launch_bounds__(kPackThreads)
    segment_packbits(const __grid_constant__ SegmentPackbitsParams params) {
  const uint32 lane = threadIdx.x % kWarpSize;
  const uint32 warp = (blockIdx.x * kPackThreads + threadIdx.x) / kWarpSize;
  const uint32 first_byte = warp * kPackRounds * 4;
  if (first_byte >= params.num_bytes) return;

  uint32 segment = segment_of(params, first_byte + lane / 8);
  uint32 begin_byte = params.new_indptr[segment], end_byte = params.new_indptr[segment + 1];
  Segment bits = segment_at(params, segment);
  for (uint32 round = 0; round < kPackRounds; ++round) {
    const uint32 byte = first_byte + round * 4 + lane / 8;
    if (byte >= end_byte && segment + 1 < params.num_segments) {
      segment = segment_of(params, byte);
      begin_byte = params.new_indptr[segment];
      end_byte = params.new_indptr[segment + 1];
      bits = segment_at(params, segment);
    }
    const uint32 bit = bits.begin + (byte - begin_byte) * 8 + lane % 8;
    const bool is_set = byte < end_byte && bit < bits.end && params.x[bit * params.x_stride] != 0;
    // The highest bit of a byte is its last lane's: for "big" the lanes of a byte vote in reverse.
    const uint32 votes = __ballot_sync(kFullWarp, is_set);
    const uint32 word = params.big ? __byte_perm(__brev(votes), 0, 0x0123) : votes;
    if (lane == 0 && byte < params.num_bytes) {
      reinterpret_cast<uint32*>(params.packed)[byte / 4] = word;
    }
  }
}

}  // namespace ridgeline
