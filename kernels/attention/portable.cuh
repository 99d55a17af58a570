// Attention for one request on tensor cores, sm_75 and up:
//   out[i, h] = sum_j softmax_j(sm_scale * q[i, h] . k[j, h / group_size]) v[j, h / group_size]
// over the keys j that the variant's mask shows query i. Layouts: params.h. A CTA takes one query
// tile of one KV head (all query heads of the group packed into its rows) and one of num_splits
// parts of the keys that the tile sees; with more than one part, combine.cuh adds them up. fp16
// everywhere, bf16 from sm_80 on; head dims up to those of HeadDims.
#pragma once

#include "attention/addressing.cuh"
#include "attention/tile.cuh"
#include "attention/variants.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

template <typename T, typename Dims, int kTileQ, typename Kv, typename Variant>
__global__ void __launch_bounds__(attention_block_size(Dims::kQk, Dims::kVo, kTileQ, kSm),
                                  attention_tile(Dims::kQk, Dims::kVo, kTileQ, kSm).ctas_per_sm)
    attention(const __grid_constant__ AttentionParams params) {
  using Traits = TileTraits<T, Dims, kTileQ, Kv, Variant>;
  extern __shared__ __align__(1024) unsigned char smem[];
  pdl_wait();
  const auto get_work = [&](int index) {
    return single_request_item<Variant, kTileQ, Traits::kKvTile>(params, index);
  };
  const auto make_kv = [&](const WorkItem& work) { return Kv(params, work); };
  const auto keep = [](KeyRange keys) { return keys; };
  attend_tile<Traits>(
      params, {params.qo_len, params.kv_len}, blockIdx.x, get_work, make_kv, keep, [] {}, smem);
}

}  // namespace ridgeline
