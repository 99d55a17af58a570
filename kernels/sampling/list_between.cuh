// Of every row for which find_between found bins: the list of their elements, and the mass that is
// kept for sure of every segment.
//
// A block takes a part as in collect_candidates, and a warp a segment; layouts, launch, access
// width and SMs as there. The second and last read of such a row.
#pragma once

#include "common/pdl.cuh"
#include "sampling/order.cuh"
#include "sampling/rows.cuh"
#include "sampling/weight_bins.cuh"

namespace ridgeline {

constexpr uint32 kHeldBetween = 2048;

struct ListScratch {
  uint64 list[kHeldBetween];
  uint32 num_listed;
  uint32 place;
};

// Why not inlined: it is rare, and would be there for every register.
__device__ __noinline__ void list_directly(Between& between, uint64* list, uint32 capacity,
                                           uint64 entry) {
  const uint32 place = atomicAdd(&between.num_listed, 1u);
  if (place < capacity) list[place] = entry;
}

template <class Kind, int kVec>
__global__ void __launch_bounds__(kCollectThreads, kVec > 1 ? 3 : 1)
    list_between(const __grid_constant__ NarrowParams params) {
  __shared__ ListScratch scratch;
  const RowInput& input = params.input;
  const uint32 num_parts = params.scratch.num_parts;
  const uint32 row = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
  const uint32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint32 num_segments = num_segments_of(input.vocab);
  const uint32 first_slice = part * params.scratch.slices_per_part;
  const uint32 left = num_slices_of(input.vocab) - first_slice;
  const uint32 count =
      left < params.scratch.slices_per_part ? left : params.scratch.slices_per_part;
  const RowFilters filters(params.filters, row, input.vocab);
  const auto* data = row_data<typename Kind::Element>(input, row);
  pdl_launch_dependents();
  if (threadIdx.x == 0) scratch.num_listed = 0;
  pdl_wait();
  Between& between = params.scratch.between[row];
  if (!between.listable) return;
  const float first_from = between.first_from, sure_from = between.sure_from;
  const float gap_from = between.gap_from;
  const float listed_from = fminf(first_from, between.k_from);
  const float max = between.max;
  const Order order{input.index_bits};
  const typename Kind::Weigher weigher = Kind::weigher(max, filters.rate);
  float least = Kind::padding();
  if (filters.min_p > 0.0) {
    least = fminf(Kind::min_p_bound(max, filters.min_p, filters.temperature), max);
  }
  uint64* list = list_of(params.scratch, row);
  uint64* kept_of = params.scratch.kept + static_cast<int64>(row) * num_segments;
  const uint32 capacity = params.scratch.row_capacity;
  __syncthreads();

  for (uint32 i = 0; i < count; ++i) {
    const uint32 segment = (first_slice + i) * kSegmentsPerSlice + warp;
    if (segment >= num_segments) break;
    float x[kHeld];
    load_segment<kVec>(data, segment * kSegmentSize, input.vocab, lane, Kind::padding(), x);
    Mass kept, dropped, gap;
    bool has_other = false;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (!(x[j] >= listed_from)) continue;
      const float weight = weigher.weight(x[j]);
      if (x[j] >= sure_from) {
        if (x[j] >= least) {
          kept.add(weight);
        } else {
          dropped.add(weight);
          has_other = true;
        }
      } else if (x[j] >= first_from || x[j] < gap_from) {
        const uint64 entry =
            order.composite(x[j], segment * kSegmentSize + held_index<kVec>(j, lane));
        const uint32 place = atomicAdd(&scratch.num_listed, 1u);
        if (place < kHeldBetween) {
          scratch.list[place] = entry;
        } else {
          list_directly(between, list, capacity, entry);
        }
      } else {
        gap.add(weight);
        has_other = true;
      }
    }
    const uint64 kept_mass = warp_mass(kept);
    if (lane == 0) kept_of[segment] = kept_mass;
    if (__any_sync(kFullWarp, has_other)) {
      const uint64 dropped_mass = warp_mass(dropped), gap_mass = warp_mass(gap);
      if (lane == 0) {
        atomicAdd(&between.dropped, dropped_mass);
        atomicAdd(&between.gap, gap_mass);
      }
    }
  }
  __syncthreads();
  const uint32 num_held = scratch.num_listed < kHeldBetween ? scratch.num_listed : kHeldBetween;
  if (threadIdx.x == 0) scratch.place = atomicAdd(&between.num_listed, num_held);
  __syncthreads();
  for (uint32 i = threadIdx.x; i < num_held; i += kCollectThreads) {
    if (scratch.place + i < capacity) list[scratch.place + i] = scratch.list[i];
  }
}

}  // namespace ridgeline
