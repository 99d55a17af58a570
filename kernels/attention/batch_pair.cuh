// Attention for two segments in one launch, sm_75 and up: two batches, each with queries, keys,
// mask, tile heights and addressing of its own, whose tiles share one work list and so one grid.
// What products bound (a prefill, a shared prefix) fills the GPU together with what memory bounds
// (decodes). As in batch.cuh otherwise; a record's segment tells which batch it is of.
//
// Why code for each segment: its parameters stay constants of the instructions that use them.
#pragma once

#include "attention/batch.cuh"
#include "attention/batch_warps.cuh"

namespace ridgeline {

// Tile heights and addressing of a segment.
template <typename Heights, typename Kv>
struct Segment {};

template <typename T, typename Dims, typename First, typename Second, typename Variant>
struct PairKernel;

template <typename T, typename Dims, typename HeightsA, typename KvA, typename HeightsB,
          typename KvB, typename Variant>
struct PairKernel<T, Dims, Segment<HeightsA, KvA>, Segment<HeightsB, KvB>, Variant> {
  using A = BatchKernel<T, Dims, HeightsA, KvA, Variant>;
  using KvOfA = KvA;
  using B = BatchKernel<T, Dims, HeightsB, KvB, Variant>;
  static constexpr int kLow = min_int(A::kLow, B::kLow);
  static constexpr int kHigh = max_int(A::kHigh, B::kHigh);
  static constexpr bool kCountsArrivals = A::kCountsArrivals || B::kCountsArrivals;
  // Whether short requests of the first are a warp's each.
  static constexpr bool kHasWarps = batch_fits_warps(Dims::kQk, Dims::kVo, A::kHigh, B::kHigh, kSm);
  static_assert(attention_block_size(Dims::kQk, Dims::kVo, A::kHigh, kSm) ==
                    attention_block_size(Dims::kQk, Dims::kVo, B::kHigh, kSm),
                "both segments' tiles have the CTA's threads");
};

// A record's item. A segment without queries has no records: one that claims to be of it is not the
// scheduler's, and held to the other.
template <typename T>
__device__ __forceinline__ BatchItem checked_item(const BatchPairParams& params,
                                                  const WorkRecord& record, int lane) {
  const int told = record.segment_height >> 8 & 1;
  const int segment = params.segments[told].num_tokens > 0 ? told : 1 - told;
  BatchItem item = checked_item<T>(params.segments[segment], record, lane);
  item.work.segment = segment;
  return item;
}

template <typename T, typename Dims, typename First, typename Second, typename Variant>
__global__ void __launch_bounds__(
    batch_block_size(Dims::kQk, Dims::kVo, PairKernel<T, Dims, First, Second, Variant>::kLow,
                     PairKernel<T, Dims, First, Second, Variant>::kHigh, kSm, false),
    batch_ctas_per_sm(Dims::kQk, Dims::kVo, PairKernel<T, Dims, First, Second, Variant>::kLow,
                      PairKernel<T, Dims, First, Second, Variant>::kHigh, kSm, false))
    batch_attention_pair(const __grid_constant__ BatchPairParams params) {
  using Kernel = PairKernel<T, Dims, First, Second, Variant>;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ BatchItem items[2];
  __shared__ Assignment assignment;
  __shared__ bool by_warps;
  pdl_wait();
  if (is_spare(params.segments[0])) return;
  if (threadIdx.x == 0) {
    const Assignment own = read_assignment(params.segments[0], Kernel::kHigh > 16, false);
    items[0] = checked_item<T>(params, own.next, own.lane);
    assignment = own;
    if constexpr (Kernel::kCountsArrivals) tile_arrivals().init(blockDim.x);
    by_warps = Kernel::kHasWarps && (own.next.segment_height & kByWarps) != 0 &&
               params.segments[0].num_tokens > 0;
  }
  __syncthreads();
  while (!by_warps && assignment.index < assignment.end) {
    if (items[0].work.segment != 0) {
      Kernel::B::template run<false>(params.segments[1], items, assignment, nullptr,
                                     smem + opaque(0));
    } else {
      Kernel::A::template run<false>(params.segments[0], items, assignment, nullptr,
                                     smem + opaque(0));
    }
    __syncthreads();
    if (threadIdx.x == 0 && ++assignment.index < assignment.end) {
      items[0] = checked_item<T>(params, assignment.next, assignment.lane);
    }
    __syncthreads();
  }
  // Why behind the loop: ahead of it, launches without such requests took 1 to 30% longer.
  if constexpr (Kernel::kHasWarps) {
    using Traits = TileTraits<T, Dims, 16, typename Kernel::KvOfA, Variant>;
    if (by_warps) attend_by_warps<Traits>(params.segments[0], assignment, smem + opaque(0));
  }
}

}  // namespace ridgeline
