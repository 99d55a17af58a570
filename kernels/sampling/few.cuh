// The largest candidates of a row whose top-k is among them (k up to kMaxCollectedK), and the draw
// from these, in few steps.
//
// A histogram of the candidates' keys leaves little more than k of them, unless there are few. A
// team of threads takes one of these and compares it with all others: how many come before it, and
// what they weigh, tells whether top-k, top-p and min-p keep it; then, what those of lower index
// weigh, whether it is the token. All sums are of integers.
#pragma once

#include "sampling/filter.cuh"

namespace ridgeline {

constexpr int kFewBinBits = 10;
constexpr uint32 kFewBins = 1u << kFewBinBits;
constexpr uint32 kFew = 96;  // candidates are compared without a histogram
static_assert(kFewBins == 2 * kRowThreads, "a thread sums two bins");

struct FewScratch {
  BlockScratch block;
  uint64 composites[kRowThreads];
  uint64 masses[kRowThreads];
  uint32 counts[kFewBins];
  uint32 num_listed;
  uint32 least_bin;
  uint64 left;  // mass of what top-k leaves
};

// Before list_largest; the block synchronises between the two.
__device__ __forceinline__ void clear(FewScratch& scratch) {
  for (uint32 i = threadIdx.x; i < kFewBins; i += kRowThreads) scratch.counts[i] = 0;
  if (threadIdx.x == 0) scratch.num_listed = scratch.least_bin = 0;
}

// The bin, from the last one down, in which the running count reaches k; 0 if none does.
__device__ __forceinline__ uint32 bin_of_kth(uint32 k, FewScratch& scratch) {
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 bin = kFewBins - 1 - 2 * threadIdx.x;
  const uint32 upper = scratch.counts[bin];
  const uint32 mine = upper + scratch.counts[bin - 1];
  uint32 inclusive = mine;
#pragma unroll
  for (uint32 offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32 other = __shfl_up_sync(kFullWarp, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == kWarpSize - 1) scratch.block.keys[warp] = inclusive;
  __syncthreads();
  const uint32 before = warp_sum(lane < warp ? scratch.block.keys[lane] : 0) + inclusive - mine;
  if (before < k && k <= before + mine) scratch.least_bin = before + upper < k ? bin - 1 : bin;
  __syncthreads();
  return scratch.least_bin;
}

// Fills composites, behind clear(); false when too many elements are as large as the k-th. `top`:
// the largest key.
__device__ __forceinline__ bool list_largest(const CandidateSource& source, const Complete& lists,
                                             uint32 top, uint32 k, FewScratch& scratch) {
  const uint32 bound = lists.bound;
  const uint32 range = top > bound ? top - bound : 0;
  const int bits = 32 - __clz(static_cast<int>(range));
  const int shift = bits > kFewBinBits ? bits - kFewBinBits : 0;
  const auto bin_of = [&](uint64 composite) {
    const uint32 above = static_cast<uint32>(composite >> source.order.index_bits) - bound;
    return above >> shift;
  };
  const uint64 floor = source.order.last_of(bound);
  uint32 least_bin = 0;
  if (lists.count > kFew) {
    source.for_each([&](uint64 composite, float) {
      if (composite >= floor) atomicAdd(&scratch.counts[bin_of(composite)], 1u);
    });
    __syncthreads();
    least_bin = bin_of_kth(k, scratch);
  }
  source.for_each([&](uint64 composite, float) {
    if (composite < floor || bin_of(composite) < least_bin) return;
    const uint32 place = atomicAdd(&scratch.num_listed, 1u);
    if (place < kRowThreads) scratch.composites[place] = composite;
  });
  __syncthreads();
  return scratch.num_listed <= kRowThreads;
}

// Threads that compare one of the listed candidates with all of them, each with its share.
struct FewTeam {
  uint32 size;       // a power of two, a warp at most
  uint32 candidate;  // from the number of them on: none
  uint32 rank;

  __device__ __forceinline__ explicit FewTeam(uint32 count) : size(kWarpSize) {
    while (size > 1 && count * size > kRowThreads) size /= 2;
    candidate = threadIdx.x / size;
    rank = threadIdx.x % size;
  }
  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    for (uint32 offset = size / 2; offset > 0; offset /= 2) {
      x += __shfl_xor_sync(kFullWarp, x, offset);
    }
    return x;
  }
};

struct FewDraw {
  bool found;  // by this thread, and no other
  uint64 composite;
};

// After list_largest; `least` is what min-p keeps at least.
template <class Weigher>
__device__ __forceinline__ FewDraw draw_of_few(const Order& order, const Weigher& weigher, uint32 k,
                                               double top_p, bool joint, uint64 row_mass,
                                               uint64 least, uint64 random, FewScratch& scratch) {
  const uint32 count = scratch.num_listed;
  if (threadIdx.x < count) {
    const float x = order.value(scratch.composites[threadIdx.x]);
    scratch.masses[threadIdx.x] = mass_of(weigher.weight(x));
  }
  __syncthreads();
  const FewTeam team(count);
  const bool listed = team.candidate < count;
  const uint64 composite = listed ? scratch.composites[team.candidate] : 0;
  const uint64 mass = listed ? scratch.masses[team.candidate] : 0;
  uint32 rank = 0;
  uint64 before = 0;
#pragma unroll 4
  for (uint32 i = team.rank; i < count; i += team.size) {
    const bool earlier = scratch.composites[i] > composite;
    rank += earlier;
    before += earlier ? scratch.masses[i] : 0;
  }
  rank = team.sum(rank);
  before = team.sum(before);
  const bool leads = listed && team.rank == 0;
  if (leads && rank == (k < count ? k : count) - 1) scratch.left = before + mass;
  __syncthreads();
  bool kept = listed && rank < k && composite >= least;
  if (top_p < 1.0) kept = kept && before < share_of(top_p, joint ? row_mass : scratch.left);
  const uint64 kept_mass = kept && leads ? mass : 0;
  if (leads) scratch.masses[team.candidate] = kept_mass;
  const uint64 target = __umul64hi(random, block_total(kept_mass, scratch.block));
  uint64 lower = 0;
  const uint64 mask = order.index_mask();
#pragma unroll 4
  for (uint32 i = team.rank; i < count; i += team.size) {
    // The lower the index, the larger these bits.
    lower += (scratch.composites[i] & mask) > (composite & mask) ? scratch.masses[i] : 0;
  }
  lower = team.sum(lower);
  return {kept && leads && lower <= target && target < lower + mass, composite};
}

}  // namespace ridgeline
