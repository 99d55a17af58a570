// The rotation of all heads of q and k of a block's tokens.
//
// Thread t of a token owns lane t % lanes_per_head of heads t / lanes_per_head + i * head_step (q's
// heads first, then k's). The block makes each token's cosines and sines once, in shared memory,
// while the first loads of q and k are in flight; a thread then keeps its own in registers for all
// of its heads. `Angles` is a function (token, pair) -> (cos, sin): position ids, and later lengths
// and offsets or a cache of cosines.
#pragma once

#include "common/pdl.cuh"
#include "common/vec.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"

namespace ridgeline {

template <class T>
struct RopeHead {
  const T* input;
  T* output;

  __device__ __forceinline__ RopeHead(const RopeTensor& q, const RopeTensor& k, uint32 num_q_heads,
                                      int64 token, uint32 head) {
    const bool is_q = head < num_q_heads;
    const RopeTensor& x = is_q ? q : k;
    const int64 head_in_x = is_q ? head : head - num_q_heads;
    input = static_cast<const T*>(x.input) + token * x.input_token_stride +
            head_in_x * x.input_head_stride;
    output = static_cast<T*>(x.output) + token * x.output_token_stride +
             head_in_x * x.output_head_stride;
  }
};

template <class T, int kVec, class Pairing, class Angles>
__device__ __forceinline__ void rotate_heads(const RopeTensor& q, const RopeTensor& k,
                                             const RopeShape& shape, const Angles& angles) {
  using Lanes = typename Pairing::template Lanes<kVec>;
  constexpr uint32 kHeads = kRopeHeadsPerThread;
  __shared__ float2 table[kRopeTableSize];  // [tokens_per_block][kVec][lanes_per_head]

  const uint32 token_in_block = shape.threads_per_token.quotient(threadIdx.x);
  const uint32 thread = threadIdx.x - token_in_block * shape.threads_per_token.divisor;
  const uint32 num_lanes = shape.lanes_per_head.divisor;
  const uint32 first_head = shape.lanes_per_head.quotient(thread);
  const uint32 lane = thread - first_head * num_lanes;
  const uint32 token = blockIdx.x * shape.tokens_per_block + token_in_block;
  // Threads past the last token only keep the barrier company.
  const uint32 num_heads = token < shape.nnz ? shape.num_heads : 0;
  const uint32 first = Lanes::first(lane);
  const uint32 second = Lanes::second(lane, shape.num_pairs);

  Vec<T, kVec> a[kHeads], b[kHeads];
  const auto load_heads = [&](uint32 chunk) {
#pragma unroll
    for (uint32 i = 0; i < kHeads; ++i) {
      const uint32 head = chunk + i * shape.head_step;
      if (head >= num_heads) continue;
      const RopeHead<T> x(q, k, shape.num_q_heads, token, head);
      a[i] = load_once<kVec>(x.input + first);
      b[i] = load_once<kVec>(x.input + second);
    }
  };
  load_heads(first_head);

  float2* token_table = table + token_in_block * shape.num_pairs;
  if (token < shape.nnz) {
    for (uint32 i = thread; i < shape.num_pairs; i += shape.threads_per_token.divisor) {
      const uint32 slot = shape.lanes_per_head.quotient(i);
      const uint32 pair = Lanes::pair(i - slot * num_lanes, slot, shape.num_pairs);
      token_table[i] = angles(token, pair);
    }
  }
  pdl_launch_dependents();
  __syncthreads();
  float2 lane_angles[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) lane_angles[i] = token_table[i * num_lanes + lane];

  for (uint32 chunk = first_head; chunk < num_heads; chunk += kHeads * shape.head_step) {
    if (chunk != first_head) load_heads(chunk);
#pragma unroll
    for (uint32 i = 0; i < kHeads; ++i) {
      const uint32 head = chunk + i * shape.head_step;
      if (head >= num_heads) continue;
      const RopeHead<T> x(q, k, shape.num_q_heads, token, head);
      Lanes::rotate(a[i], b[i], lane_angles);
      // Why not streaming stores: attention and the cache append read the output next.
      store(x.output + first, a[i]);
      store(x.output + second, b[i]);
      // What lies beyond rotary_dim is copied unchanged.
      for (uint32 vec = lane; vec < shape.num_copied_vecs; vec += num_lanes) {
        const uint32 element = 2 * shape.num_pairs + vec * kVec;
        store(x.output + element, load_once<kVec>(x.input + element));
      }
    }
  }
}

}  // namespace ridgeline
