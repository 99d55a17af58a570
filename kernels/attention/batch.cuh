// Attention for a batch of requests of any lengths, sm_75 and up: as in portable.cuh, with queries
// and keys of each request where the work list says. A CTA runs the records of its team's share
// (or, in a list by tile, one record), each a query tile of its own KV head against a range of
// keys; tiles of two heights may meet in one launch. Parts of cut tiles are added up by the CTA
// that finishes last, or by batch_combine.cuh.
//
// The list is the caller's: every field is held to its range, and a list of another configuration
// (its tag differs) runs nothing.
#pragma once

#include "attention/addressing.cuh"
#include "attention/assignment.cuh"
#include "attention/batch_stream.cuh"
#include "attention/tile.cuh"
#include "attention/variants.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// Runs the record in items[0]: alone, or with those that its stream goes on with. Why not beside
// tall tiles: these lose what a stream gains there.
template <typename Traits, bool kStreams>
__device__ __forceinline__ void run_records(const BatchAttentionParams& params,
                                            BatchItem (&items)[2], Assignment& assignment,
                                            OwnCuts* cuts, unsigned char* smem) {
  if constexpr (kStreams) {
    attend_stream<Traits>(params, items, assignment, cuts, smem);
  } else {
    BatchItem& item = items[0];
    const auto fetch_next = [&] {
      if (threadIdx.x != 0) return;
      fetch_record(params, assignment, 1);
      if constexpr (Traits::kCountsArrivals) {
        // Why already: the first copies are on their way meanwhile.
        const int last_row = tile_rows<Traits>(params.attention, item.request, item.work) - 1;
        item.seen_by_all = {
            row_keys<Traits>(params.attention, item.request, item.work, last_row).begin,
            row_keys<Traits>(params.attention, item.request, item.work, 0).end};
      }
    };
    const auto get_work = [&](int) -> const WorkItem& { return item.work; };
    const auto make_kv = [&](const WorkItem&) { return typename Traits::Kv(params, item); };
    const auto keep = [&](KeyRange keys) -> const KeyRange& {
      if constexpr (!Traits::kCountsArrivals) {
        if (threadIdx.x == 0) item.seen_by_all = keys;
        __syncthreads();
      }
      return item.seen_by_all;
    };
    attend_tile<Traits>(params.attention, item.request, 0, get_work, make_kv, keep, fetch_next,
                        params.keys_are_read_once != 0, smem);
  }
}

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
struct BatchKernel;

template <typename Traits>
struct OfOneHeight {
  static constexpr int kLow = Traits::kTileQ;
  static constexpr int kHigh = Traits::kTileQ;
  static constexpr bool kWide = Traits::kWide;
  static constexpr bool kCountsArrivals = Traits::kCountsArrivals;
  template <bool kStreams>
  static __device__ __forceinline__ void run(const BatchAttentionParams& params,
                                             BatchItem (&items)[2], Assignment& assignment,
                                             OwnCuts* cuts, unsigned char* smem) {
    run_records<Traits, kStreams>(params, items, assignment, cuts, smem);
  }
};

template <typename T, typename Dims, int kHeight, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<kHeight>, Kv, Variant>
    : OfOneHeight<TileTraits<T, Dims, kHeight, Kv, Variant>> {};

template <typename T, typename Dims, int kHeight, typename Kv, typename Variant>
struct BatchKernel<T, Dims, WideHeight<kHeight>, Kv, Variant>
    : OfOneHeight<TileTraits<T, Dims, kHeight, Kv, Variant, true>> {};

template <typename T, typename Dims, int low, int high, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<low, high>, Kv, Variant> {
  static constexpr int kLow = low;
  static constexpr int kHigh = high;
  static constexpr bool kWide = false;
  static constexpr bool kCountsArrivals = TileTraits<T, Dims, high, Kv, Variant>::kCountsArrivals;
  template <bool kStreams>
  static __device__ __forceinline__ void run(const BatchAttentionParams& params,
                                             BatchItem (&items)[2], Assignment& assignment,
                                             OwnCuts* cuts, unsigned char* smem) {
    if (items[0].height_idx == 0) {
      run_records<TileTraits<T, Dims, low, Kv, Variant>, kStreams>(params, items, assignment, cuts,
                                                                   smem);
    } else {
      run_records<TileTraits<T, Dims, high, Kv, Variant>, kStreams>(params, items, assignment, cuts,
                                                                    smem);
    }
  }
};

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
__global__ void __launch_bounds__(
    batch_block_size(Dims::kQk, Dims::kVo, BatchKernel<T, Dims, Heights, Kv, Variant>::kLow,
                     BatchKernel<T, Dims, Heights, Kv, Variant>::kHigh, kSm,
                     BatchKernel<T, Dims, Heights, Kv, Variant>::kWide),
    batch_ctas_per_sm(Dims::kQk, Dims::kVo, BatchKernel<T, Dims, Heights, Kv, Variant>::kLow,
                      BatchKernel<T, Dims, Heights, Kv, Variant>::kHigh, kSm,
                      BatchKernel<T, Dims, Heights, Kv, Variant>::kWide))
    batch_attention(const __grid_constant__ BatchAttentionParams params) {
  using Kernel = BatchKernel<T, Dims, Heights, Kv, Variant>;
  constexpr int kWarps =
      batch_block_size(Dims::kQk, Dims::kVo, Kernel::kLow, Kernel::kHigh, kSm, Kernel::kWide) / 32;
  constexpr bool kSplits = kSm >= 90 && Kernel::kLow < Kernel::kHigh;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ BatchItem items[2];
  __shared__ Assignment assignment;
  __shared__ OwnCuts cuts;
  const bool finishes = Kernel::kHigh == 16 && params.attention.counters != nullptr;
  pdl_wait();
  if constexpr (Kernel::kHigh == 16) Kv::fetch_first(params);
  if (threadIdx.x == 0) {
    const Assignment own = read_assignment(params, Kernel::kHigh > 16, kSplits);
    items[0] = checked_item<T>(params, own.next, own.lane);
    assignment = own;
    cuts.index[0] = cuts.index[1] = -1;
    if constexpr (Kernel::kCountsArrivals) tile_arrivals().init(kWarps * 32);
    if (finishes && own.index < own.end) keep_cut(params, own.next, 0, cuts);
    if constexpr (kSplits) {
      if (own.index >= own.end) {
        take_part<T, Kernel::kLow, Kernel::kHigh>(params, items[0], assignment);
      }
    }
  }
  if (finishes && threadIdx.x >= 32) {
    clear_rows<T>(params, reinterpret_cast<const ListHeader*>(params.list)->num_tokens,
                  blockIdx.x * (kWarps - 1) + threadIdx.x / 32 - 1, gridDim.x * (kWarps - 1));
  }
  __syncthreads();
  while (assignment.index < assignment.end) {
    Kernel::template run<Kernel::kHigh == 16>(params, items, assignment, finishes ? &cuts : nullptr,
                                              smem + opaque(0));
    __syncthreads();
    if (threadIdx.x == 0 && ++assignment.index < assignment.end) {
      items[0] = checked_item<T>(params, assignment.next, assignment.lane);
      if (finishes) keep_cut(params, assignment.next, 1, cuts);
    }
    __syncthreads();
  }
  if constexpr (Kernel::kHigh == 16) {
    // Of a CTA without records the first page numbers may still be on their way.
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (finishes) {
    finish<T, kWarps, groups_at_once(Dims::kVo, kSm)>(params, cuts, assignment.lane);
  }
}

}  // namespace ridgeline
