// Accepts a chain of draft tokens and draws the token after the last accepted one, so that the
// tokens are distributed as if drawn from the target model (Leviathan et al., "Fast inference from
// transformers via speculative decoding", 2023).
//
// Draft token i is accepted when u_i * draft_probs[i, token] < target_probs[i, token], compared
// exactly (u_i has 32 bits, in float64). After the first that is not, the next token is drawn from
// max(target - draft, 0); after none, from the last row of target_probs. tokens [batch, num_draft +
// 1] holds the emitted ones, then -1. accepted counts all tokens that pass their own test, emitted
// those before the first that does not. draft_probs [batch, num_draft, vocab], target_probs [batch,
// num_draft + 1, vocab], any strides but a last one of 1. A block of kRowThreads threads takes a
// request. All SMs. Draft tokens out of range are clamped.
#pragma once

#include "sampling/philox.cuh"
#include "sampling/select.cuh"

namespace ridgeline {

// max(target - draft, 0), or target alone. What no weight can be made of counts as 0.
struct ResidualSource {
  const float* target;
  const float* draft;  // may be null
  uint32 vocab;
  Order order;

  __device__ __forceinline__ float at(uint32 index) const {
    const float x = target[index] - (draft ? draft[index] : 0.0f);
    return x > 0.0f && x <= 0x1p100f ? x : 0.0f;
  }
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
#pragma unroll 4
    for (uint32 index = threadIdx.x; index < vocab; index += kRowThreads) {
      const float x = at(index);
      visit(order.composite(x, index), x);
    }
  }
};

// False when the source has no mass.
__device__ __forceinline__ bool draw_of(const ResidualSource& source, uint64 random,
                                        SelectScratch& scratch, uint32& token) {
  float mine = 0.0f;
  source.for_each([&](uint64, float x) { mine = fmaxf(mine, x); });
  const float max = value_of(block_max(key_of(mine), scratch.block));
  if (!(max > 0.0f)) return false;
  const ProbWeigher weigher = Probs::weigher(max, 1.0f);
  const uint64 mass = mass_from(source, weigher, 0, scratch);
  token = index_at(source, weigher, source.order, 0, __umul64hi(random, mass), scratch);
  return true;
}

__global__ void __launch_bounds__(kRowThreads)
    chain_speculative_sampling(const __grid_constant__ ChainParams params) {
  __shared__ SelectScratch scratch;
  __shared__ uint32 num_emitted;
  const uint32 request = blockIdx.x, num_draft = params.num_draft;
  const float* draft = params.draft_probs + request * params.draft_strides[0];
  const float* target = params.target_probs + request * params.target_strides[0];
  const auto draft_token = [&](uint32 i) -> uint32 {
    const int64 at = request * params.token_strides[0] + i * params.token_strides[1];
    const int64 token = params.wide_tokens ? static_cast<const int64*>(params.draft_tokens)[at]
                                           : static_cast<const int32*>(params.draft_tokens)[at];
    const int64 last = static_cast<int64>(params.vocab) - 1;
    return static_cast<uint32>(token < 0 ? 0 : token > last ? last : token);
  };

  if (threadIdx.x == 0) num_emitted = num_draft;
  __syncthreads();
  uint64 num_accepted = 0;
  for (uint32 i = threadIdx.x; i < num_draft; i += kRowThreads) {
    const uint32 token = draft_token(i);
    const double u = static_cast<double>(random_bits(params.keys, request, i + 1) >> 32) * 0x1p-32;
    const double q = draft[i * params.draft_strides[1] + token];
    if (u * q < static_cast<double>(target[i * params.target_strides[1] + token])) {
      ++num_accepted;
    } else {
      atomicMin(&num_emitted, i);
    }
  }
  num_accepted = block_total(num_accepted, scratch.block);
  const uint32 emitted = num_emitted;

  const Order order{params.index_bits};
  const float* last = target + emitted * params.target_strides[1];
  const float* rejected = emitted < num_draft ? draft + emitted * params.draft_strides[1] : nullptr;
  const uint64 random = random_bits(params.keys, request, 0);
  uint32 token = 0;
  if (!draw_of({last, rejected, params.vocab, order}, random, scratch, token)) {
    draw_of({last, nullptr, params.vocab, order}, random, scratch, token);
  }

  int32* tokens = params.tokens + static_cast<int64>(request) * (num_draft + 1);
  for (uint32 i = threadIdx.x; i <= num_draft; i += kRowThreads) {
    tokens[i] = i < emitted    ? static_cast<int32>(draft_token(i))
                : i == emitted ? static_cast<int32>(token)
                               : -1;
  }
  if (threadIdx.x == 0) {
    params.accepted[request] = static_cast<int32>(num_accepted);
    params.emitted[request] = static_cast<int32>(emitted);
  }
}

}  // namespace ridgeline
