// Rotary position embedding of q and k by position ids:
// (x, y) -> (x cos - y sin, y cos + x sin) for pair i of a head, at the angle
// pos_ids[token] / rope_scale * theta^(-i / num_pairs); float32, rounded once.
//
// q [nnz, num_q_heads, head_dim], k [nnz, num_k_heads, head_dim] of T, any strides but a last one
// of 1; out of place or in place. kVec elements move at once: 16 bytes, or 1 element when a
// pointer, a stride or num_pairs does not allow that. Pairing is HalfSplit or Interleaved. Who owns
// what: rotate.cuh. Launch: rope_plan(), ceil(nnz / tokens_per_block) blocks. All SMs.
#pragma once

#include "rope/angle.cuh"
#include "rope/rotate.cuh"

namespace ridgeline {

struct PosIdsAngles {
  const RopePosIdsParams& params;
  int64 position;

  __device__ __forceinline__ void load(uint32 token) {
    position = params.pos_ids_are_int64 ? static_cast<const int64*>(params.pos_ids)[token]
                                        : static_cast<const int32*>(params.pos_ids)[token];
  }
  __device__ __forceinline__ float2 cos_sin(uint32 pair) const {
    return ridgeline::cos_sin(position, params.turns[pair]);
  }
};

template <class T, int kVec, class Pairing>
__global__ void __launch_bounds__(kRopeMaxThreads)
    apply_rope_pos_ids(const __grid_constant__ RopePosIdsParams params) {
  pdl_wait();
  rotate_heads<T, kVec, Pairing>(params.q, params.k, params.shape, PosIdsAngles{params, 0});
}

}  // namespace ridgeline
