// The k largest elements of a row and their indices, k up to kMaxCollectedK: the larger first and
// of equal ones the lower index, or all by index.
//
// input [num_inputs, vocab]; values [num_rows, k] of the input's type and indices [num_rows, k],
// contiguous. A block of kRowThreads threads takes a row, behind collect_candidates. A team takes
// one of the largest candidates and counts those that come before it; a row whose lists do not hold
// its k largest (NaN, nothing above -inf, many equal elements) is searched as a whole. Launch:
// num_rows blocks. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "sampling/few.cuh"

namespace ridgeline {

union TopKScratch {
  SelectScratch select;
  FewScratch few;
};

// Fills composites with the row's k largest.
template <class Kind>
__device__ __forceinline__ void list_of_whole(const RowSource<typename Kind::Element>& source,
                                              uint32 k, TopKScratch& scratch) {
  uint64 cut = 0;
  const Range range{0, source.order.first_of(0xffffffffu)};
  select<false>(source, Kind::weigher(0.0f, 1.0f), range, ~uint64{0}, k, scratch.select, cut);
  __syncthreads();
  if (threadIdx.x == 0) scratch.few.num_listed = 0;
  __syncthreads();
  source.for_each([&](uint64 composite, float) {
    if (composite < cut) return;
    scratch.few.composites[atomicAdd(&scratch.few.num_listed, 1u)] = composite;
  });
  __syncthreads();
}

// Where the composite of this thread's team goes, if it is one of the k largest; else k or more.
__device__ __forceinline__ uint32 place_of(const FewTeam& team, const Order& order, uint32 k,
                                           bool sorted, FewScratch& scratch) {
  const uint32 count = scratch.num_listed;
  const bool listed = team.candidate < count;
  const uint64 composite = listed ? scratch.composites[team.candidate] : 0;
  uint32 rank = 0;
#pragma unroll 4
  for (uint32 i = team.rank; i < count; i += team.size) rank += scratch.composites[i] > composite;
  rank = team.sum(rank);
  if (!listed) rank = k;
  if (sorted) return rank;
  const uint64 mask = order.index_mask();
  __syncthreads();
  // The lower the index, the larger these bits.
  if (listed && team.rank == 0) {
    scratch.composites[team.candidate] = rank < k ? composite & mask : 0;
  }
  __syncthreads();
  uint32 place = 0;
#pragma unroll 4
  for (uint32 i = team.rank; i < count; i += team.size) {
    place += scratch.composites[i] > (composite & mask);
  }
  place = team.sum(place);
  return rank < k ? place : k;
}

template <class Kind>
__global__ void __launch_bounds__(kRowThreads, 2) top_k(const __grid_constant__ TopKParams params) {
  using T = typename Kind::Element;
  __shared__ TopKScratch scratch;
  const RowInput& input = params.input;
  const uint32 row = blockIdx.x, k = params.k;
  const uint32 num_segments = num_segments_of(input.vocab);
  const Order order{input.index_bits};
  const T* data = row_data<T>(input, row);
  const SegmentStats* segments = params.scratch.segments + static_cast<int64>(row) * num_segments;
  const CandidateSource source = candidates_of(params.scratch, row, order);
  clear(scratch.few);
  pdl_wait();
  const Complete lists = complete_from(source);
  uint32 top = 0;
  for (uint32 i = threadIdx.x; i < num_segments; i += kRowThreads) {
    const uint32 key = key_of(segments[i].max);
    top = top > key ? top : key;
  }
  top = block_max(top, scratch.few.block);
  if (!lists.all || !list_largest(source, lists, top, k, scratch.few) ||
      scratch.few.num_listed < k) {
    __syncthreads();
    list_of_whole<Kind>({data, input.vocab, order}, k, scratch);
  }
  const FewTeam team(scratch.few.num_listed);
  const bool listed = team.candidate < scratch.few.num_listed;
  const uint32 index = order.index(listed ? scratch.few.composites[team.candidate] : 0);
  const uint32 place = place_of(team, order, k, params.sorted, scratch.few);
  if (place >= k || team.rank != 0) return;
  const int64 at = static_cast<int64>(row) * k + place;
  static_cast<T*>(params.values)[at] = data[index];
  params.indices[at] = index;
}

}  // namespace ridgeline
