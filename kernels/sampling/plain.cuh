// The token of a row without filters: the segment in which the running mass passes a random number,
// or the largest element is, then the element.
#pragma once

#include "sampling/block.cuh"
#include "sampling/philox.cuh"

namespace ridgeline {

struct PlainScratch {
  BlockScratch block;
  uint32 segment;
  uint32 token;
  uint64 rest;
};

// Where the running mass of a row's segments passes `target`, and what is left of it there, in the
// segment's own unit. A thread takes some segments in succession.
template <class Kind, uint32 kThreads>
__device__ __forceinline__ uint32 segment_at(const SegmentStats* segments, uint32 num_segments,
                                             float rate, const typename Kind::Weigher& weigher,
                                             uint64& target, PlainScratch& scratch) {
  const uint32 share = (num_segments + kThreads - 1) / kThreads;
  const auto scale_of = [&](const SegmentStats& stats) {
    return Kind::weigher(stats.max, rate).scale_in(weigher);
  };
  const auto mass_in_row = [&](uint32 i) -> uint64 {
    if (i >= num_segments) return 0;
    const SegmentStats stats = segments[i];
    return scaled_mass(stats.mass, scale_of(stats));
  };
  uint32 segment = threadIdx.x * share;
  uint64 mine = 0;
  for (uint32 i = 0; i < share; ++i) mine += mass_in_row(segment + i);
  uint64 before = sum_before(mine, scratch.block);
  if (before <= target && target < before + mine) {
    for (uint64 mass = mass_in_row(segment); before + mass <= target;) {
      before += mass;
      mass = mass_in_row(++segment);
    }
    const SegmentStats stats = segments[segment];
    const auto rest = static_cast<uint64>(static_cast<double>(target - before) / scale_of(stats));
    scratch.rest = rest < stats.mass ? rest : stats.mass - 1;
    scratch.segment = segment;
  }
  __syncthreads();
  target = scratch.rest;
  return scratch.segment;
}

// target in [0, mass).
template <class Kind, uint32 kThreads>
__device__ __forceinline__ uint32 plain_token(const typename Kind::Element* data, uint32 vocab,
                                              const SegmentStats* segments, float rate,
                                              const typename Kind::Weigher& weigher, uint64 target,
                                              PlainScratch& scratch) {
  constexpr uint32 kShare = kSegmentSize / kThreads;
  const uint32 segment =
      segment_at<Kind, kThreads>(segments, num_segments_of(vocab), rate, weigher, target, scratch);
  const uint32 first = segment * kSegmentSize + threadIdx.x * kShare;
  float x[kShare];
#pragma unroll
  for (uint32 i = 0; i < kShare; ++i) {
    x[i] = first + i < vocab ? to_float(data[first + i]) : Kind::padding();
  }
  const typename Kind::Weigher own = Kind::weigher(segments[segment].max, rate);
  uint64 masses[kShare];
  uint64 mine = 0;
#pragma unroll
  for (uint32 i = 0; i < kShare; ++i) {
    masses[i] = mass_of(own.weight(x[i]));
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

// The lowest index of the largest element.
template <class Kind, uint32 kThreads>
__device__ __forceinline__ uint32 greedy_token(const typename Kind::Element* data, uint32 vocab,
                                               const SegmentStats* segments, float max,
                                               PlainScratch& scratch) {
  const uint32 num_segments = num_segments_of(vocab);
  uint32 segment = num_segments;
  for (uint32 i = threadIdx.x; i < num_segments && segment == num_segments; i += kThreads) {
    if (segments[i].max == max) segment = i;
  }
  segment = block_min(segment, scratch.block);
  uint32 token = vocab;
#pragma unroll
  for (uint32 i = 0; i < kSegmentSize / kThreads; ++i) {
    const uint32 index = segment * kSegmentSize + i * kThreads + threadIdx.x;
    if (index < vocab && to_float(data[index]) == max && token == vocab) token = index;
  }
  return block_min(token, scratch.block);
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
