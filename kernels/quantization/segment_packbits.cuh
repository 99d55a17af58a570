// packbits of each segment x[indptr[s]] to x[indptr[s + 1] - 1] by itself: its bytes begin at
// packed[new_indptr[s]], and new_indptr[s + 1] - new_indptr[s] = ceil(length / 8).
//
// A warp owns num_rounds rounds of kPackBytes bytes of packed, at once if they lie inside one
// segment. A round inside a segment, which may begin at any bit: a lane loads whole aligned vectors
// of 16 bits and shifts what it makes of them together with its neighbour's. Another: each byte
// looks for its own segment. Bytes past the last segment are 0. x of any stride. Whatever indptr
// holds, segments are cut to x and new_indptr is monotonic and at most num_bytes. Up to
// kFewSegments segments, each block sums up their bytes in shared memory; for more,
// segment_offsets, one block, does it once before. All SMs.
#pragma once

#include "common/reduce.cuh"
#include "quantization/bits.cuh"
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

// x plus those of the lanes before, at most `most`, which is below 2^31 and at least x.
__device__ __forceinline__ uint32 warp_prefix_sum(uint32 x, uint32 most) {
  const uint32 lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (uint32 offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32 other = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x = min(x + other, most);
  }
  return x;
}

// use(s, end): for each segment s, the byte at which it ends. By all threads of the block.
template <uint32 kThreads, class Use>
__device__ __forceinline__ void for_each_end(const SegmentPackbitsParams& params, const Use& use) {
  constexpr uint32 kWarps = kThreads / kWarpSize;
  __shared__ uint32 warp_sums[kWarps];
  const uint32 lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32 most = params.num_bytes;
  uint32 before = 0;  // bytes of the segments of earlier rounds
  for (uint32 first = 0; first < params.num_segments; first += kThreads) {
    const uint32 segment = first + threadIdx.x;
    uint32 sum = 0;
    if (segment < params.num_segments) {
      const Segment bits = segment_at(params, segment);
      sum = min((bits.end - bits.begin + 7) / 8, most);
    }
    sum = warp_prefix_sum(sum, most);
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    const uint32 sums = warp_prefix_sum(lane < kWarps ? warp_sums[lane] : 0, most);
    const uint32 of_others = __shfl_sync(kFullWarp, sums, warp == 0 ? 0 : warp - 1);
    sum = min(sum + min(before + (warp == 0 ? 0 : of_others), most), most);
    if (segment < params.num_segments) use(segment, sum);
    before = min(before + __shfl_sync(kFullWarp, sums, kWarps - 1), most);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kScanThreads)
    segment_offsets(const __grid_constant__ SegmentPackbitsParams params) {
  if (threadIdx.x == 0) params.new_indptr[0] = 0;
  for_each_end<kScanThreads>(params, [&](uint32 segment, uint32 end) {
    params.new_indptr[segment + 1] = static_cast<int32>(end);
  });
}

// Where segments begin in packed.
struct SegmentBytes {
  const uint32* begins;  // [num_segments + 1]

  // The last of the segments from first to last, of which the first begins at or before the byte,
  // that begins at or before it.
  __device__ __forceinline__ uint32 segment_of(uint32 byte, uint32 first, uint32 last) const {
    while (first < last) {
      const uint32 middle = last - (last - first) / 2;
      if (begins[middle] <= byte) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }

  // That of all segments, by all lanes of a warp; each round cuts what is left into 33 parts.
  __device__ __forceinline__ uint32 segment_of(uint32 byte, uint32 num_segments) const {
    uint32 first = 0, count = num_segments;
    while (count > 1) {
      const uint32 step = (count + kWarpSize) / (kWarpSize + 1);
      const uint32 probe = (threadIdx.x % kWarpSize + 1) * step;
      const bool begun = probe < count && begins[first + probe] <= byte;
      const uint32 skipped = __popc(__ballot_sync(kFullWarp, begun)) * step;
      first += skipped;
      count = min(count - skipped, step);
    }
    return first;
  }
};

// Bits [bit, bit + 8) of x, of which those from end on are 0, the first one lowest.
__device__ __forceinline__ uint32 byte_of_bits(const SegmentPackbitsParams& params, uint32 bit,
                                               uint32 end) {
  uint32 bits = 0;
#pragma unroll
  for (uint32 i = 0; i < 8; ++i) {
    if (bit + i >= end) continue;
    bits |= static_cast<uint32>(params.x[(bit + i) * params.x_stride] != 0) << i;
  }
  return bits;
}

// Bytes [first_byte, first_byte + kRounds * kPackBytes) of packed, if they lie inside one segment
// and the vectors around its bits in x; by all lanes of a warp.
template <uint32 kRounds>
__device__ __forceinline__ bool pack_inside(const SegmentPackbitsParams& params,
                                            const SegmentBytes& segments, uint32 first_byte) {
  constexpr uint32 kBytes = kRounds * kPackBytes;
  const uint32 segment = segments.segment_of(first_byte, params.num_segments);
  const uint32 begin = segments.begins[segment], end = segments.begins[segment + 1];
  const Segment in = segment_at(params, segment);
  const uint32 bit = in.begin + (first_byte - begin) * 8, after = bit + kBytes * 8;
  const uint8* source = params.x + bit;
  const uint32 shift = static_cast<uint32>(reinterpret_cast<uint64>(source) % 16);
  const bool is_inside = first_byte + kBytes <= end && after <= in.end && shift <= bit &&
                         (shift == 0 || after + 16 - shift <= params.num_bits);
  if (!is_inside || params.x_stride != 1) return false;

  const uint32 lane = threadIdx.x % kWarpSize;
  const uint8* vectors = source - shift;
  uint32 bits[kRounds + 1];  // 16 each; the last, the same in all lanes, follow the rounds
#pragma unroll
  for (uint32 round = 0; round < kRounds; ++round) {
    bits[round] = sixteen_bits(vectors + (round * kWarpSize + lane) * 16);
  }
  // Without a shift nothing of them counts, and they may lie behind x.
  bits[kRounds] = sixteen_bits(vectors + (shift == 0 ? 0 : kRounds * kWarpSize * 16));
#pragma unroll
  for (uint32 round = 0; round < kRounds; ++round) {
    const uint32 next =
        __shfl_sync(kFullWarp, lane == 0 ? bits[round + 1] : bits[round], (lane + 1) % kWarpSize);
    const uint32 both = (bits[round] | next << 16) >> shift;
    const uint32 packed = params.big ? __byte_perm(__brev(both), 0, 0x4423) : both;
    const uint32 pair = first_byte / 2 + round * kWarpSize + lane;
    reinterpret_cast<uint16*>(params.packed)[pair] = static_cast<uint16>(packed);
  }
  return true;
}

// Bytes [first_byte, first_byte + kPackBytes) of packed, wherever they lie; by all lanes of a warp.
__device__ __forceinline__ void pack_across(const SegmentPackbitsParams& params,
                                            const SegmentBytes& segments, uint32 first_byte) {
  const uint32 last_byte = min(first_byte + kPackBytes, params.num_bytes) - 1;
  const uint32 first = segments.segment_of(first_byte, params.num_segments);
  const uint32 last = segments.segment_of(last_byte, params.num_segments);
#pragma unroll
  for (uint32 i = 0; i < 2; ++i) {
    const uint32 byte = first_byte + threadIdx.x % kWarpSize * 2 + i;
    if (byte > last_byte) continue;
    const uint32 segment = segments.segment_of(byte, first, last);
    const Segment in = segment_at(params, segment);
    const uint32 begin = segments.begins[segment], end = segments.begins[segment + 1];
    const uint32 bits =
        byte < end ? byte_of_bits(params, in.begin + (byte - begin) * 8, in.end) : 0;
    params.packed[byte] = static_cast<uint8>(ordered(bits, params.big));
  }
}

// kSums: the block sums up the segments itself.
template <bool kSums>
__global__ void __launch_bounds__(kPackThreads)
    segment_packbits(const __grid_constant__ SegmentPackbitsParams params) {
  __shared__ uint32 begins[kSums ? kFewSegments + 1 : 1];
  SegmentBytes segments{reinterpret_cast<const uint32*>(params.new_indptr)};
  if constexpr (kSums) {
    if (threadIdx.x == 0) begins[0] = 0;
    if (blockIdx.x + threadIdx.x == 0) params.new_indptr[0] = 0;
    for_each_end<kPackThreads>(params, [&](uint32 segment, uint32 end) {
      begins[segment + 1] = end;
      if (blockIdx.x == 0) params.new_indptr[segment + 1] = static_cast<int32>(end);
    });
    segments.begins = begins;
  }
  const uint32 warp = (blockIdx.x * kPackThreads + threadIdx.x) / kWarpSize;
  const uint32 first_byte = warp * params.num_rounds * kPackBytes;
  if (params.num_rounds == kPackRounds && first_byte < params.num_bytes &&
      pack_inside<kPackRounds>(params, segments, first_byte)) {
    return;
  }
  for (uint32 round = 0; round < params.num_rounds; ++round) {
    const uint32 byte = first_byte + round * kPackBytes;
    if (byte >= params.num_bytes) return;
    if (!pack_inside<1>(params, segments, byte)) pack_across(params, segments, byte);
  }
}

}  // namespace ridgeline
