// The k largest elements of a row and their indices, k up to kMaxCollectedK: the larger first and
// of equal ones the lower index, or all by index.
//
// input [num_inputs, vocab]; values [num_rows, k] of the input's type and indices [num_rows, k],
// contiguous. A block of kRowThreads threads takes a row, behind collect_candidates. A thread takes
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

// Where this thread's composite goes, if it is one of the k largest; k or more: nowhere.
__device__ __forceinline__ uint32 place_of(const Order& order, uint32 k, bool sorted,
                                           FewScratch& scratch) {
  const uint32 count = scratch.num_listed;
  const bool listed = threadIdx.x < count;
  const uint64 composite = listed ? scratch.composites[threadIdx.x] : 0;
  uint32 rank = listed ? 0 : k;
  if (listed) {
#pragma unroll 4
    for (uint32 i = 0; i < count; ++i) rank += scratch.composites[i] > composite;
  }
  if (sorted) return rank;
  __syncthreads();
  const uint64 mask = order.index_mask();
  // The lower the index, the larger these bits.
  if (listed) scratch.composites[threadIdx.x] = rank < k ? composite & mask : 0;
  __syncthreads();
  if (rank >= k) return k;
  uint32 place = 0;
#pragma unroll 4
  for (uint32 i = 0; i < count; ++i) place += scratch.composites[i] > (composite & mask);
  return place;
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
  pdl_wait();
  const Complete lists = complete_from(source);
  float max = Kind::padding();
  for (uint32 i = threadIdx.x % kWarpSize; i < num_segments; i += kWarpSize) {
    max = fmaxf(max, segments[i].max);
  }
  if (!lists.all || !list_largest(source, lists, key_of(warp_max(max)), k, scratch.few) ||
      scratch.few.num_listed < k) {
    __syncthreads();
    list_of_whole<Kind>({data, input.vocab, order}, k, scratch);
  }
  const uint32 index = order.index(scratch.few.composites[threadIdx.x]);
  const uint32 place = place_of(order, k, params.sorted, scratch.few);
  if (place >= k) return;
  const int64 at = static_cast<int64>(row) * k + place;
  static_cast<T*>(params.values)[at] = data[index];
  params.indices[at] = index;
}

}  // namespace ridgeline
