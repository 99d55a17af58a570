// rope_append_paged_kv_cache for its most common call: 16-bit heads of kRopePlainHeadDim that turn
// as a whole, by frequencies, one behind the other in every token, 32-bit indices. The same bits.
// Why a kernel of its own: the GPU fetches instructions and parameters anew for every launch, so
// with few tokens each of them counts.
//
// A warp owns kRopePlainHeads heads of a token, all of q, of k or of v: a team of lanes owns a head
// at a time, each lane a vector of either half. Warps wait for no other. Launch: a block of
// kRopePlainWarps warps for each such slice of as many tokens. All SMs.
#pragma once

#include "common/arch.cuh"
#include "common/fp8.cuh"
#include "common/paging.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"

namespace ridgeline {

// A vector of each half of a head.
template <class T>
struct HeadHalves {
  static constexpr int kVec = 8;
  static constexpr int kHalf = kRopePlainHeadDim / 2;
  Vec<T, kVec> a, b;

  __device__ __forceinline__ void load(const T* head) {
    a = ridgeline::load<kVec>(head);
    b = ridgeline::load<kVec>(head + kHalf);
  }
  __device__ __forceinline__ void store(T* head) const {
    ridgeline::store(head, a);
    ridgeline::store(head + kHalf, b);
  }
  __device__ __forceinline__ void to_floats(float (&x)[kVec], float (&y)[kVec]) const {
    a.to_floats(x);
    b.to_floats(y);
  }
  __device__ __forceinline__ void from_floats(const float (&x)[kVec], const float (&y)[kVec]) {
    a.from_floats(x);
    b.from_floats(y);
  }
};

// Blocks an SM. More of them spill, before sm_86 eight do so already.
inline constexpr int kRopePlainBlocks = kSm > 80 ? 8 : 6;

template <class T, class KV, class Pairing, bool kNorms>
__global__ void __launch_bounds__(kRopePlainWarps * 32, kRopePlainBlocks)
    rope_append_plain(const __grid_constant__ RopePlainParams params) {
  using Halves = HeadHalves<T>;
  constexpr int kVec = Halves::kVec, kHalf = Halves::kHalf;
  constexpr uint32 kTeam = kHalf / kVec, kTeams = kWarpSize / kTeam;
  constexpr int kHeads = kRopePlainHeads / kTeams;  // of a thread
  constexpr bool kConverts = sizeof(T) != sizeof(KV);
  using Lanes = typename Pairing::template Lanes<kVec>;
  using Table = AngleTable<kVec, kHalf>;
  __shared__ Table tables[kRopePlainWarps];
  Table& table = tables[threadIdx.x / kWarpSize];
  const uint32 group = params.num_slices.quotient(blockIdx.x);
  const uint32 slice = blockIdx.x - group * params.num_slices.divisor;
  const uint32 token = group * kRopePlainWarps + threadIdx.x / kWarpSize;
  if (token >= params.num_tokens) return;
  const bool is_q = slice < params.first_k_slice, is_v = slice >= params.first_v_slice;
  const uint32 lane = threadIdx.x % kTeam;
  const uint32 first_slice = is_q ? 0 : is_v ? params.first_v_slice : params.first_k_slice;
  const uint32 first_head =
      (slice - first_slice) * kRopePlainHeads + threadIdx.x % kWarpSize / kTeam;
  const uint32 num_heads = is_q ? params.num_q_heads : params.num_kv_heads;
  pdl_wait();

  const int32 angle_position = params.pos_ids[token];
  Halves parts[kHeads], weights;
  const T* source = static_cast<const T*>(is_q   ? params.q
                                          : is_v ? params.v
                                                 : params.k) +
                    uint64{token} * (is_q   ? params.q_token_stride
                                     : is_v ? params.v_token_stride
                                            : params.k_token_stride) +
                    first_head * kRopePlainHeadDim + lane * kVec;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i * kTeams >= num_heads) continue;
    parts[i].load(source + i * (kTeams * kRopePlainHeadDim));
  }
  int32 request = 0, position = 0;
  GuessedPages guess;
  if (!is_q) {
    request = params.batch_indices[token];
    position = params.positions[token];
    guess = GuessedPages(params.table, token);
  }
  if (kNorms && !is_v) {
    weights.load(static_cast<const T*>(is_q ? params.q_weight : params.k_weight) + lane * kVec);
  }
  const auto pair_of = [](uint32 i) { return Lanes::pair(i % kTeam, i / kTeam, kHalf); };
  const uint32 idx = threadIdx.x % kWarpSize;
  // Past the constant cache, where lanes that read different addresses wait for each other.
  uint64 turns_at = reinterpret_cast<uint64>(params.turns);
  asm volatile("" : "+l"(turns_at));
  const uint64* turns = reinterpret_cast<const uint64*>(turns_at);
  const uint64 first_turns = turns[pair_of(idx)];
  const uint64 other_turns = turns[pair_of(idx + kWarpSize)];
  PageEntry entry{};
  uint32 page = 0;
  if (!is_q) {
    entry = page_entry_of(params.table, request, position, guess);
    page = fetch_page(params.table, entry);
  }
  if (!is_v) {
    table.put(idx / kTeam, idx % kTeam, cos_sin(first_turns, angle_position));
    table.put(idx / kTeam + kWarpSize / kTeam, idx % kTeam, cos_sin(other_turns, angle_position));
    __syncwarp();
  }
  pdl_launch_dependents();
  float norms[kHeads];
  if (kNorms && !is_v) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      float x[kVec], y[kVec];
      parts[i].to_floats(x, y);
      norms[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        norms[i] = fmaf(x[j], x[j], norms[i]);
        norms[i] = fmaf(y[j], y[j], norms[i]);
      }
    }
    group_reduce<Sum>(norms, kTeam);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      norms[i] = rsqrtf(__fdividef(norms[i], float{kRopePlainHeadDim}) + params.eps);
    }
  }
  HeadHalves<KV> results[kHeads];
  if (!is_v || kConverts) {
    const uint32 angles_at = table.address(lane);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      float x[kVec], y[kVec];
      parts[i].to_floats(x, y);
      if (!is_v) {
        if constexpr (kNorms) {
          float w[kVec], z[kVec];
          weights.to_floats(w, z);
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            x[j] *= norms[i] * w[j];
            y[j] *= norms[i] * z[j];
          }
        }
        float2 angles[kVec];
        Table::read(angles, angles_at);
        Lanes::rotate(x, y, angles);
      }
      if constexpr (!kConverts) {
        parts[i].from_floats(x, y);
      } else if (is_q) {
        parts[i].from_floats(x, y);
      } else {
        const float scale = is_v ? params.v_inverse_scale : params.k_inverse_scale;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          x[j] *= scale;
          y[j] *= scale;
        }
        results[i].from_floats(x, y);
      }
    }
  }
  const auto store = [&](const auto& heads, auto* target, uint32 head_stride) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const uint32 head = first_head + i * kTeams;
      if (head < num_heads) heads[i].store(target + head * head_stride + lane * kVec);
    }
  };
  if (is_q) {
    store(parts, static_cast<T*>(params.q_out) + uint64{token} * params.q_out_token_stride,
          kRopePlainHeadDim);
    return;
  }
  const TokenPlace place = place_of(params.table, entry, page);
  if (!place.exists) return;
  const PagedStrides& strides = is_v ? params.v_strides : params.k_strides;
  KV* target = static_cast<KV*>(is_v ? params.v_cache : params.k_cache) +
               strides.offset(place.page, place.slot, 0);
  if constexpr (kConverts) {
    store(results, target, static_cast<uint32>(strides.head));
  } else {
    store(parts, reinterpret_cast<T*>(target), static_cast<uint32>(strides.head));
  }
}

}  // namespace ridgeline
