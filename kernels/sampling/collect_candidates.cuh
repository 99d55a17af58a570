// row_segments, and of every slice a short list of elements that is sure to hold what the filters
// keep of it.
//
// A block holds a slice of 8,192 elements in registers, 32 a thread. The k-th largest of its 512
// half-thread maxima is a lower bound of the k-th largest element; a bisection finds a bound that
// is nearly that. Elements from the bound on are the list: about 1.1 k of them, in any order, since
// whatever reads them is indifferent to it. The row is read once, whatever its spread. Layouts,
// launch and limits as in row_segments.cuh. A list that does not fit (many equal elements, k over
// kMaxCollectedK) is marked, and the row is searched as a whole.
#pragma once

#include "common/pdl.cuh"
#include "sampling/order.cuh"
#include "sampling/rows.cuh"

namespace ridgeline {

struct CollectScratch {
  uint32 counts[2][kSegmentsPerSlice];  // of a warp, two rounds in turn
  uint32 least[kSegmentsPerSlice];
  uint32 most[kSegmentsPerSlice];
  uint32 num_collected;
};

// A key that at least k of the block's halves (two keys a thread) reach, or `floor` if fewer reach
// that; nearly the largest such key.
__device__ __forceinline__ uint32 bound_of(const uint32 (&half_max)[2], uint32 k, uint32 floor,
                                           CollectScratch& scratch) {
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint32 least = half_max[0] < half_max[1] ? half_max[0] : half_max[1];
  uint32 most = half_max[0] < half_max[1] ? half_max[1] : half_max[0];
#pragma unroll
  for (uint32 offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint32 other_least = __shfl_xor_sync(kFullWarp, least, offset);
    const uint32 other_most = __shfl_xor_sync(kFullWarp, most, offset);
    least = least < other_least ? least : other_least;
    most = most > other_most ? most : other_most;
  }
  if (lane == 0) {
    scratch.least[warp] = least;
    scratch.most[warp] = most;
  }
  __syncthreads();
#pragma unroll
  for (uint32 i = 0; i < kSegmentsPerSlice; ++i) {
    least = least < scratch.least[i] ? least : scratch.least[i];
    most = most > scratch.most[i] ? most : scratch.most[i];
  }
  uint32 low = least > floor ? least : floor;  // reached by enough, or the floor
  if (most <= low) return low;
  uint32 high = most;  // one above, at the first step, would be reached by none
  const uint32 enough = k + k / 8 + 1;
  for (int round = 0; round < 24 && low < high; ++round) {
    const uint32 middle = low + (high - low + 1) / 2;
    const uint32 count = __popc(__ballot_sync(kFullWarp, half_max[0] >= middle)) +
                         __popc(__ballot_sync(kFullWarp, half_max[1] >= middle));
    uint32* counts = scratch.counts[round % 2];
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    uint32 total = 0;
#pragma unroll
    for (uint32 i = 0; i < kSegmentsPerSlice; ++i) total += counts[i];
    if (total < k) {
      high = middle - 1;
    } else {
      low = middle;
      if (total <= enough) break;
    }
  }
  return low;
}

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads, 4)
    collect_candidates(const __grid_constant__ CollectParams params) {
  __shared__ CollectScratch scratch;
  const RowInput& input = params.input;
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 row = blockIdx.x / num_slices, slice = blockIdx.x % num_slices;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 segment = slice * kSegmentsPerSlice + warp;
  const uint32 num_segments = num_segments_of(input.vocab);
  float x[kHeld];
  load_segment<kVec>(row_data<typename Kind::Element>(input, row), segment * kSegmentSize,
                     input.vocab, lane, Kind::padding(), x);
  const RowFilters filters(params.filters, row, input.vocab);
  pdl_launch_dependents();
  if (threadIdx.x == 0) scratch.num_collected = 0;

  const SegmentStats stats = segment_stats<Kind>(x, filters.rate);
  if (lane == 0 && segment < num_segments) {
    params.scratch.segments[static_cast<int64>(row) * num_segments + segment] = stats;
  }

  const int64 list_idx = static_cast<int64>(row) * num_slices + slice;
  const bool bad = __syncthreads_or(stats.max != stats.max);
  if (bad || !filters.any() || filters.k > kMaxCollectedK) {
    if (threadIdx.x == 0) params.scratch.slices[list_idx] = {kOverflow, 0};
    return;
  }
  float half_max[2] = {Kind::padding(), Kind::padding()};
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    half_max[2 * j / kHeld] = fmaxf(half_max[2 * j / kHeld], x[j]);
  }
  const uint32 keys[2] = {key_of(half_max[0]), key_of(half_max[1])};
  const uint32 bound =
      bound_of(keys, filters.k > 0 ? filters.k : kSpeculativeK, Kind::kLeastKey, scratch);
  const float least = value_of(bound);
  const Order order{input.index_bits};
  uint64* list = params.scratch.candidates + list_idx * kSliceCapacity;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    if (x[j] >= least) {
      const uint32 place = atomicAdd(&scratch.num_collected, 1u);
      const uint32 index = segment * kSegmentSize + held_index<kVec>(j, lane);
      if (place < kSliceCapacity) list[place] = order.composite(x[j], index);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32 count = scratch.num_collected;
    params.scratch.slices[list_idx] = {count <= kSliceCapacity ? count : kOverflow, bound};
  }
}

}  // namespace ridgeline
