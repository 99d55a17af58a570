// row_segments, and of every part of a row a short list of elements that is sure to hold what a
// small top-k keeps of it, or, for filters that may keep many, a histogram of the weights.
//
// A block takes a part, a slice of 8,192 elements at a time in registers, 32 a thread. Each thread
// knows the largest elements of two groups: of the 16 registers' halves, over all slices so far.
// The k-th largest of these 512 is a lower bound of the k-th largest element, and a search by
// quarters finds a bound that is nearly that; it rises while the part is read. Elements from the
// bound on are the list: at the end about 1.1 k of them, in any order, since whatever reads them is
// indifferent to it. The row is read once, whatever its spread. Layouts, access width and SMs as in
// row_segments.cuh; launch: kCollectThreads threads, num_rows * num_parts blocks. A list that does
// not fit (many equal elements) is marked, and the row is searched as a whole.
#pragma once

#include "common/arch.cuh"
#include "common/opaque.cuh"
#include "common/pdl.cuh"
#include "sampling/order.cuh"
#include "sampling/rows.cuh"
#include "sampling/weight_bins.cuh"

namespace ridgeline {

constexpr uint32 kHeldCandidates = 2048;

struct CollectScratch {
  union {
    uint64 list[kHeldCandidates];
    uint32 histogram[kWeightBins];
  };
  float maxima[kSegmentsPerSlice];
  alignas(16) uint32 counts[2][kSegmentsPerSlice];  // of a warp, two rounds in turn
  uint32 least[kSegmentsPerSlice];
  uint32 most[kSegmentsPerSlice];
  uint32 num_listed;
  uint32 num_written;
};

// The sum of what the warps count, each number below 2^32 in all.
__device__ __forceinline__ uint32 sum_of_warps(uint32 mine, uint32 (&counts)[kSegmentsPerSlice]) {
  if (threadIdx.x % kWarpSize == 0) counts[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  uint32 total = 0;
#pragma unroll
  for (uint32 i = 0; i < kSegmentsPerSlice; ++i) total += counts[i];
  return total;
}

// A key that at least k of the block's groups (two keys a thread) reach, or `floor` if fewer reach
// that; nearly the largest such key.
__device__ __forceinline__ uint32 bound_of(const float (&group_max)[2], uint32 k, uint32 floor,
                                           CollectScratch& scratch) {
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 keys[2] = {key_of(group_max[0]), key_of(group_max[1])};
  uint32 least = warp_min(keys[0] < keys[1] ? keys[0] : keys[1]);
  uint32 most = warp_max(keys[0] < keys[1] ? keys[1] : keys[0]);
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
  const auto count_from = [&](uint32 key) {
    return static_cast<uint32>(__popc(__ballot_sync(kFullWarp, keys[0] >= key)) +
                               __popc(__ballot_sync(kFullWarp, keys[1] >= key)));
  };
  // A quarter of the range remains of each round. Counts, 512 at most, take 10 bits each.
  for (int round = 0; round < 12 && low < high; ++round) {
    const uint32 width = high - low;
    const uint32 pivots[3] = {low + width / 4 + 1, low + width / 2 + 1, high - width / 4};
    const uint32 mine =
        count_from(pivots[0]) | count_from(pivots[1]) << 10 | count_from(pivots[2]) << 20;
    const uint32 totals = sum_of_warps(mine, scratch.counts[round % 2]);
    uint32 reached = 0;
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const uint32 total = totals >> (10 * i) & 1023;
      if (reached > 0) continue;
      if (total >= k) {
        low = pivots[i];
        reached = total;
      } else {
        high = pivots[i] - 1;
      }
    }
    if (reached > 0 && reached <= enough) break;
  }
  return low;
}

// The largest of 256 pieces spread over the row; every part finds the same.
template <class Kind, int kVec>
__device__ __forceinline__ float row_reference(const typename Kind::Element* data, uint32 vocab,
                                               CollectScratch& scratch) {
  const uint32 num_pieces = vocab / kVec;
  const auto place = static_cast<uint32>(uint64{num_pieces} * threadIdx.x / kCollectThreads);
  const auto piece = load<kVec>(data + place * kVec);
  float max = Kind::padding();
#pragma unroll
  for (int i = 0; i < kVec; ++i) max = fmaxf(max, to_float(piece.elements[i]));
  max = warp_max(max);
  if (threadIdx.x % kWarpSize == 0) scratch.maxima[threadIdx.x / kWarpSize] = max;
  __syncthreads();
#pragma unroll
  for (uint32 i = 0; i < kSegmentsPerSlice; ++i) max = fmaxf(max, scratch.maxima[i]);
  return max > -kInfinity && max < kInfinity ? max : 0.0f;
}

// Drops from the list what is below `bound`, and what is of the indices from `end` on.
__device__ __forceinline__ void prune(CollectScratch& scratch, const Order& order, uint32 bound,
                                      uint32 end) {
  const uint32 count = scratch.num_listed < kHeldCandidates ? scratch.num_listed : kHeldCandidates;
  __syncthreads();
  if (threadIdx.x == 0) scratch.num_listed = 0;
  for (uint32 first = 0; first < count; first += kCollectThreads) {
    const uint32 i = first + threadIdx.x;
    const uint64 entry = i < count ? scratch.list[i] : 0;
    // Why here: what was read may be overwritten from now on.
    __syncthreads();
    if (i < count && entry >= order.last_of(bound) && order.index(entry) < end) {
      scratch.list[atomicAdd(&scratch.num_listed, 1u)] = entry;
    }
  }
  __syncthreads();
}

// Adds this slice's elements from `bound` on to the list. False when it is full. Synchronises.
template <int kVec, class T>
__device__ __forceinline__ bool append(CollectScratch& scratch, const Order& order, const T* data,
                                       const float (&x)[kHeld], uint32 first, uint32 bound) {
  const float least = value_of(bound);
  uint32 mine = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) mine |= x[j] >= least ? 1u << j : 0;
  uint32 place = 0;
  if (mine != 0) {
    place = atomicAdd(&scratch.num_listed, static_cast<uint32>(__popc(mine)));
    // Why read again: registers have no index, and 32 copies of this code would take longer to
    // fetch than the few elements that there are.
    for (; mine != 0; mine &= mine - 1, ++place) {
      const int j = __ffs(static_cast<int>(mine)) - 1;
      const uint32 index = first + held_index<kVec>(j, threadIdx.x % kWarpSize);
      if (place < kHeldCandidates)
        scratch.list[place] = order.composite(to_float(data[index]), index);
    }
  }
  return !__syncthreads_or(place > kHeldCandidates);
}

// Which row and which of its parts this block takes. Why opaque: to divide again costs less than
// two registers while a row is read.
__device__ __forceinline__ uint32 row_of(uint32 num_parts) {
  return static_cast<uint32>(opaque(static_cast<int>(blockIdx.x))) / num_parts;
}
__device__ __forceinline__ uint32 part_of(uint32 num_parts) {
  return static_cast<uint32>(opaque(static_cast<int>(blockIdx.x))) % num_parts;
}

// What the list holds from `bound` on becomes the part's; `complete` false: there is none.
__device__ __forceinline__ void write_list(const Scratch& memory, const Order& order, uint32 bound,
                                           bool complete, CollectScratch& scratch) {
  const uint32 row = row_of(memory.num_parts), part = part_of(memory.num_parts);
  if (complete) {
    uint64* written = list_of(memory, row) + part * kPartCapacity;
    const uint32 num_listed = scratch.num_listed;
    for (uint32 i = threadIdx.x; i < num_listed; i += kCollectThreads) {
      const uint64 entry = scratch.list[i];
      if (entry < order.last_of(bound)) continue;
      const uint32 to = atomicAdd(&scratch.num_written, 1u);
      if (to < kPartCapacity) written[to] = entry;
    }
    __syncthreads();
    complete = scratch.num_written <= kPartCapacity;
  }
  if (threadIdx.x == 0) {
    memory.parts[static_cast<int64>(row) * memory.num_parts + part] = {
        complete ? scratch.num_written : kOverflow, bound};
  }
}

template <class Kind, int kVec, bool kCounts>
__device__ __forceinline__ void collect(const CollectParams& params, CollectScratch& scratch) {
  const RowInput& input = params.input;
  const uint32 num_parts = params.scratch.num_parts;
  const uint32 row = row_of(num_parts);
  const uint32 lane = threadIdx.x % kWarpSize;
  const uint32 num_segments = num_segments_of(input.vocab);
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 first_slice = part_of(num_parts) * params.scratch.slices_per_part;
  const uint32 left = num_slices - first_slice;
  const uint32 count =
      left < params.scratch.slices_per_part ? left : params.scratch.slices_per_part;
  const typename Kind::Element* data = row_data<typename Kind::Element>(input, row);
  const uint32 first_segment = first_slice * kSegmentsPerSlice + threadIdx.x / kWarpSize;
  SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  const RowFilters filters(params.filters, row, input.vocab);
  pdl_launch_dependents();
  const Order order{input.index_bits};
  bool collects = filters.k > 0 && filters.k <= kMaxCollectedK;
  const bool counts = kCounts && !collects && (filters.k > 0 || filters.top_p < 1.0);
  WeightBins<Kind> bins;
  if (counts) {
    bins = {row_reference<Kind, kVec>(data, input.vocab, scratch), filters.rate};
    for (uint32 i = threadIdx.x; i < kWeightBins; i += kCollectThreads) scratch.histogram[i] = 0;
    __syncthreads();
  }
  bool bad = false;
  float group_max[2] = {Kind::padding(), Kind::padding()};
  uint32 bound = Kind::kLeastKey;
  if (threadIdx.x == 0) scratch.num_listed = scratch.num_written = 0;

  for (uint32 i = 0; i < count; ++i) {
    const uint32 segment = first_segment + i * kSegmentsPerSlice;
    float x[kHeld];
    // Why through L1: append() reads some again.
    load_segment<kVec, kCounts>(data, segment * kSegmentSize, input.vocab, lane, Kind::padding(),
                                x);
    const float slice_max[2] = {lane_max<0, kHeld / 2>(x), lane_max<kHeld / 2, kHeld>(x)};
    group_max[0] = fmaxf(group_max[0], slice_max[0]);
    group_max[1] = fmaxf(group_max[1], slice_max[1]);
    const SegmentStats stats =
        segment_stats<Kind>(x, max_or_nan(slice_max[0], slice_max[1]), filters.rate);
    if (lane == 0 && segment < num_segments) segments[segment] = stats;
    bad |= stats.max != stats.max;
    if (counts) {
      // What pads the row counts in bin 0, of which nothing but an upper bound is asked.
#pragma unroll
      for (int j = 0; j < kHeld; ++j) atomicAdd(&scratch.histogram[bins.of(x[j])], 1u);
    }
    if (!collects) continue;
    // Slices in which the bound rises: 1, 2, 4, 8, ... are enough, unless the row rises too.
    bool rises = (i & (i + 1)) == 0 || i + 1 == count;
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      if (rises) bound = bound_of(group_max, filters.k, bound, scratch);
      if (attempt > 0) prune(scratch, order, bound, segment / kSegmentsPerSlice * kSliceSize);
      collects = append<kVec>(scratch, order, data, x, segment * kSegmentSize, bound);
      if (collects) break;
      rises = true;
    }
  }

  collects = !__syncthreads_or(bad || !collects);
  if (counts) {
    if (part_of(num_parts) == 0 && threadIdx.x == 0) {
      params.scratch.references[row_of(num_parts)] = bins.reference;
    }
    uint32* histogram = params.scratch.histograms + static_cast<int64>(blockIdx.x) * kWeightBins;
    for (uint32 i = threadIdx.x; i < kWeightBins; i += kCollectThreads) {
      histogram[i] = scratch.histogram[i];
    }
  }
  write_list(params.scratch, order, bound, collects, scratch);
}

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads, kVec > 1 && kSm >= 90 ? 4 : 3)
    collect_candidates(const __grid_constant__ CollectParams params) {
  __shared__ CollectScratch scratch;
  collect<Kind, kVec, false>(params, scratch);
}

// With histograms of the rows whose top-k is none or large.
template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads, kVec > 1 ? 3 : 1)
    collect_histograms(const __grid_constant__ CollectParams params) {
  __shared__ CollectScratch scratch;
  collect<Kind, kVec, true>(params, scratch);
}

}  // namespace ridgeline
