// The token of a row without filters: the segment in which the running mass passes a random number,
// then the element.
#pragma once

#include "sampling/block.cuh"
#include "sampling/philox.cuh"

namespace ridgeline {

struct PlainScratch {
  BlockScratch block;
  uint32 token;
};

// Where the running mass of a row's segments passes `target`, and what is left of it there, in the
// segment's own unit. Every warp for itself.
template <class Kind>
__device__ __forceinline__ uint32 segment_at(const SegmentStats* segments, uint32 num_segments,
                                             float rate, const typename Kind::Weigher& weigher,
                                             uint64& target) {
  const uint32 lane = threadIdx.x % kWarpSize;
  const uint32 share = (num_segments + kWarpSize - 1) / kWarpSize;
  const auto mass_in_row = [&](uint32 i) -> uint64 {
    if (i >= num_segments) return 0;
    const SegmentStats stats = segments[i];
    return scaled_mass(stats.mass, Kind::weigher(stats.max, rate).scale_in(weigher));
  };
  uint64 mine = 0;
  for (uint32 i = 0; i < share; ++i) mine += mass_in_row(lane * share + i);
  uint64 inclusive = mine;
#pragma unroll
  for (uint32 offset = 1; offset < kWarpSize; offset *= 2) {
    const uint64 other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  uint64 before = inclusive - mine, rest = 0;
  uint32 segment = 0;
  const bool here = before <= target && target < inclusive;
  if (here) {
    segment = lane * share;
    for (uint64 mass = mass_in_row(segment); before + mass <= target;) {
      before += mass;
      mass = mass_in_row(++segment);
    }
    const SegmentStats stats = segments[segment];
    const float scale = Kind::weigher(stats.max, rate).scale_in(weigher);
    rest = static_cast<uint64>(static_cast<double>(target - before) / scale);
    rest = rest < stats.mass ? rest : stats.mass - 1;
  }
  const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, here))) - 1;
  target = __shfl_sync(kFullWarp, rest, owner);
  return __shfl_sync(kFullWarp, segment, owner);
}

// target in [0, mass).
template <class Kind, uint32 kThreads>
__device__ __forceinline__ uint32 plain_token(const typename Kind::Element* data, uint32 vocab,
                                              const SegmentStats* segments, float rate,
                                              const typename Kind::Weigher& weigher, uint64 target,
                                              PlainScratch& scratch) {
  constexpr uint32 kShare = kSegmentSize / kThreads;
  const uint32 segment = segment_at<Kind>(segments, num_segments_of(vocab), rate, weigher, target);
  const typename Kind::Weigher own = Kind::weigher(segments[segment].max, rate);
  const uint32 first = segment * kSegmentSize + threadIdx.x * kShare;
  uint64 masses[kShare];
  uint64 mine = 0;
#pragma unroll
  for (uint32 i = 0; i < kShare; ++i) {
    masses[i] = first + i < vocab ? mass_of(own.weight(to_float(data[first + i]))) : 0;
    mine += masses[i];
  }
  uint64 before = sum_before(mine, scratch.block);
  if (before <= target && target < before + mine) {
    uint32 token = first;
#pragma unroll
    for (uint32 i = 0; i + 1 < kShare; ++i) {
      before += masses[i];
      token += before <= target;
    }
    scratch.token = token;
  }
  __syncthreads();
  return scratch.token;
}

// What one thread writes of a row.
struct Drawn {
  uint32 token;
  float log_weight;  // to base 2
};

__device__ __forceinline__ void write_drawn(const DrawParams& params, uint32 row,
                                            const Drawn& drawn, uint64 row_mass) {
  const float log_mass = log2f(static_cast<float>(row_mass)) - kMassBits;
  params.tokens[row] = static_cast<int32>(drawn.token);
  params.valid[row] = 1;
  params.log_probs[row] = (drawn.log_weight - log_mass) * kLn2;
}

__device__ __forceinline__ void write_invalid(const DrawParams& params, uint32 row) {
  params.tokens[row] = 0;
  params.valid[row] = 0;
  params.log_probs[row] = __uint_as_float(0x7fffffffu);
}

}  // namespace ridgeline
