// Attention for one request on tensor cores, sm_75 and up:
//   out[i, h] = sum_j softmax_j(sm_scale * q[i, h] . k[j, h / group_size]) v[j, h / group_size]
// over the keys j that the variant's mask shows query i. Layouts: params.h. A CTA takes one query
// tile of one KV head (all query heads of the group packed into its rows) and one of num_splits
// parts of the keys that the tile sees; with more than one part, the CTA that finishes last adds
// them up, or combine.cuh. fp16 everywhere, bf16 from sm_80 on; head dims up to those of HeadDims.
#pragma once

#include "attention/addressing.cuh"
#include "attention/merge_parts.cuh"
#include "attention/tile.cuh"
#include "attention/variants.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// Counts a part of a tile, which all threads of the CTA have written; with the last one it adds all
// of them up.
template <typename T, typename Traits>
__device__ __forceinline__ void finish_part(const AttentionParams& params, const WorkItem& work) {
  __shared__ bool completes;
  const int num_splits = params.num_splits.divisor;
  const int tile = params.num_splits.quotient(work.partial_row / Traits::kTileQ);
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = params.counters + tile;
    __threadfence();
    completes = atomicAdd(counter, 1) + 1 == num_splits;
    if (completes) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!completes) return;
  merge_tile<T, Traits::kNumThreads / 32, groups_at_once(Traits::kVo, kSm)>(
      params, tile_rows<Traits>(params, {params.qo_len, params.kv_len}, work),
      Traits::Variant::exponent_scale(params),
      [&](int row) -> CutRow {
        return {int64(tile) * num_splits * Traits::kTileQ + row, Traits::kTileQ, num_splits};
      },
      [&](int row) { return row_target(params, work, row); });
}

template <typename T, typename Dims, int kTileQ, typename Kv, typename Variant>
__global__ void __launch_bounds__(attention_block_size(Dims::kQk, Dims::kVo, kTileQ, kSm),
                                  attention_ctas_per_sm(Dims::kQk, Dims::kVo, kTileQ, kSm))
    attention(const __grid_constant__ AttentionParams params) {
  using Traits = TileTraits<T, Dims, kTileQ, Kv, Variant>;
  extern __shared__ __align__(1024) unsigned char smem[];
  if constexpr (Traits::kCountsArrivals) {
    if (threadIdx.x == 0) tile_arrivals().init(Traits::kNumThreads);
    __syncthreads();
  }
  pdl_wait();
  const auto get_work = [&](int index) {
    return single_request_item<Variant, kTileQ, Traits::kKvTile>(params, index);
  };
  const auto make_kv = [&](const WorkItem& work) { return typename Traits::Kv(params, work); };
  const auto keep = [](KeyRange keys) { return keys; };
  attend_tile<Traits>(
      params, {params.qo_len, params.kv_len}, blockIdx.x, get_work, make_kv, keep, [] {}, false,
      smem);
  if constexpr (kTileQ == 16) {
    if (params.counters != nullptr)
      finish_part<T, Traits>(params, get_work(opaque(int(blockIdx.x))));
  }
}

}  // namespace ridgeline
