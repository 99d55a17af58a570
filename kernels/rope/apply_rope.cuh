// Rotary position embedding of q and k: (x, y) -> (x cos - y sin, y cos + x sin) for pair i of a
// head, at the angle of pair i at the token's position; float32, rounded once.
//
// q [nnz, num_q_heads, head_dim], k [nnz, num_k_heads, head_dim] of T, any strides but a last one
// of 1; out of place or in place. kVec elements move at once: 16 bytes, or 1 element when a
// pointer, a stride or num_pairs does not allow that. Pairing is HalfSplit or Interleaved,
// Positions PosIds or RequestOffsets, Angles Frequencies or CosSinCache. Who owns what: rotate.cuh.
// Launch: rope_plan(), ceil(nnz / tokens_per_block) blocks. All SMs.
#pragma once

#include "rope/rotate.cuh"

namespace ridgeline {

// Why two blocks an SM: told of one, ptxas aims at six and spills for it on sm_80.
template <class T, int kVec, class Pairing, class Positions, class Angles>
__global__ void __launch_bounds__(kRopeMaxThreads, 2)
    apply_rope(const __grid_constant__ RopeParams<Positions, Angles> params) {
  pdl_wait();
  rotate_heads<T, kVec, Pairing>(params);
}

}  // namespace ridgeline
