// The rotation of all heads of q and k of a block's tokens.
//
// Thread t of a token owns lane t % lanes_per_head of heads t / lanes_per_head + i * head_step (q's
// heads first, then k's). The block makes each token's cosines and sines once, in shared memory,
// while the first loads of q and k are in flight; a thread then keeps its own in registers for all
// of its heads.
#pragma once

#include "common/pdl.cuh"
#include "common/vec.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"
#include "rope/positions.cuh"

namespace ridgeline {

// The heads of one token, q's first, then k's.
template <class T>
struct RopeToken {
  const T* q_input;
  const T* k_input;
  T* q_output;
  T* k_output;

  __device__ __forceinline__ RopeToken(const RopeTensor& q, const RopeTensor& k, uint32 num_q_heads,
                                       int64 token) {
    q_input = static_cast<const T*>(q.input) + token * q.input_token_stride;
    q_output = static_cast<T*>(q.output) + token * q.output_token_stride;
    // From the first of all heads, so that both are indexed alike.
    k_input = static_cast<const T*>(k.input) + token * k.input_token_stride -
              num_q_heads * k.input_head_stride;
    k_output = static_cast<T*>(k.output) + token * k.output_token_stride -
               num_q_heads * k.output_head_stride;
  }
};

// Fills a token's [kVec][num_lanes] cosines and sines, as thread `thread` of num_threads.
template <class Lanes, class CosSin>
__device__ __forceinline__ void fill_angles(float2* table, uint32 num_pairs,
                                            const Divider& num_lanes, uint32 thread,
                                            uint32 num_threads, const CosSin& cos_sin_of) {
  for (uint32 i = thread; i < num_pairs; i += num_threads) {
    const uint32 slot = num_lanes.quotient(i);
    table[i] = cos_sin_of(Lanes::pair(i - slot * num_lanes.divisor, slot, num_pairs));
  }
}

template <class T, int kVec, class Pairing, class Positions, class Angles>
__device__ __forceinline__ void rotate_heads(const RopeParams<Positions, Angles>& params) {
  const RopeTensor& q = params.q;
  const RopeTensor& k = params.k;
  const RopeShape& shape = params.shape;
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

  const RopeToken<T> heads(q, k, shape.num_q_heads, token);
  const auto input_of = [&](uint32 head) {
    return head < shape.num_q_heads ? heads.q_input + head * q.input_head_stride
                                    : heads.k_input + head * k.input_head_stride;
  };
  const auto output_of = [&](uint32 head) {
    return head < shape.num_q_heads ? heads.q_output + head * q.output_head_stride
                                    : heads.k_output + head * k.output_head_stride;
  };

  Vec<T, kVec> a[kHeads], b[kHeads];
  const auto load_heads = [&](uint32 chunk) {
#pragma unroll
    for (uint32 i = 0; i < kHeads; ++i) {
      const uint32 head = chunk + i * shape.head_step;
      if (head >= num_heads) continue;
      const T* input = input_of(head);
      a[i] = load_once<kVec>(input + first);
      b[i] = load_once<kVec>(input + second);
    }
  };
  PositionOf<Positions> position_of;
  if (token < shape.nnz) position_of.load(params.positions, token);
  load_heads(first_head);

  float2* token_table = table + token_in_block * shape.num_pairs;
  const int64 position = position_of.get(params.positions, shape, token_in_block);
  if (token < shape.nnz) {
    fill_angles<Lanes>(token_table, shape.num_pairs, shape.lanes_per_head, thread,
                       shape.threads_per_token.divisor,
                       [&](uint32 pair) { return cos_sin(params.angles, position, pair); });
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
      T* output = output_of(head);
      rotate<Lanes>(a[i], b[i], lane_angles);
      // Why not streaming stores: attention and the cache append read the output next.
      store(output + first, a[i]);
      store(output + second, b[i]);
      // What lies beyond rotary_dim is copied unchanged.
      for (uint32 vec = lane; vec < shape.num_copied_vecs; vec += num_lanes) {
        const uint32 element = 2 * shape.num_pairs + vec * kVec;
        store(output + element, load_once<kVec>(input_of(head) + element));
      }
    }
  }
}

}  // namespace ridgeline
