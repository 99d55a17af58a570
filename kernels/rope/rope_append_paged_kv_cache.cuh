// One pass from a projection to attention: q and k are normalised head by head (if the norm has
// weights), rotated, q is written out, k and v go to their places in a paged pool. float32 inside,
// rounded once, to T for q and to KV for the pool: k = cast(rope(norm(k)) / scale).
//
// q, k [nnz, num_heads, head_dim], v [nnz, num_kv_heads, head_dim_vo] of T, any strides but a last
// one of 1; q's output may be its input. A pool in either layout. kVec elements move at once: 16
// bytes of T, or 1 element where a pointer, a stride or a size does not allow that. A team of
// team_size lanes owns a head; lane i owns units i, i + team_size, ... of two vectors each
// (HeadUnits). Thread t of a token owns heads t / team_size + i * head_step of its slice, in the
// order q, k, v. A token's angles are made once a block, in shared memory, while its first heads
// are on their way. Tokens without a place in the pool are not appended; their q is written.
// Launch: rope_append_plan(), blocks of tokens times slices. All SMs; head dims up to
// kRopeAppendMaxHeadDim.
#pragma once

#include "common/paging.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "page/cast.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"
#include "rope/rotate.cuh"

namespace ridgeline {

// Where the two vectors of a unit begin in their head, how many of them exist, and whether they
// turn.
struct Unit {
  uint32 first, second;
  uint32 count;
  bool turns;
};

template <class Lanes, int kVec>
__device__ __forceinline__ Unit unit_of(const HeadUnits& units, uint32 num_pairs, uint32 idx) {
  if (idx < units.num_turning) {
    return {Lanes::first(idx), Lanes::second(idx, num_pairs), 2, true};
  }
  const uint32 rest = idx - units.num_turning;
  const uint32 first = units.rotary_dim + rest * kVec;
  const uint32 count = (rest < units.num_rest) + (rest + units.num_rest < units.rest_vecs);
  return {first, first + units.num_rest * kVec, count, false};
}

// The weights of q's and k's norm as floats, [2][kRopeAppendMaxHeadDim].
template <class T>
__device__ __forceinline__ void fill_norm_weights(float* weights, const HeadNorm& norm) {
  const uint32 head_dim = static_cast<uint32>(norm.head_dim);
  for (uint32 i = threadIdx.x; i < 2 * head_dim; i += blockDim.x) {
    const bool is_k = i >= head_dim;
    const uint32 element = is_k ? i - head_dim : i;
    const void* source = is_k ? norm.k_weight : norm.q_weight;
    weights[is_k * kRopeAppendMaxHeadDim + element] =
        norm.weights_are_float ? static_cast<const float*>(source)[element]
                               : to_float(static_cast<const T*>(source)[element]);
  }
}

template <int kVec>
__device__ __forceinline__ float squares(const float (&x)[kVec]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

template <int kVec>
__device__ __forceinline__ void scale_by(float (&x)[kVec], float scale, const float* weights) {
  float w[kVec];
  load<kVec>(weights).to_floats(w);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] *= scale * w[i];
}

template <class To, int kVec>
__device__ __forceinline__ void store_scaled(To* target, const float (&x)[kVec], float scale) {
  float scaled[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) scaled[i] = x[i] * scale;
  Vec<To, kVec> y;
  y.from_floats(scaled);
  store(target, y);
}

// Why two blocks an SM: told of one, ptxas aims at three and spills for it before sm_89.
template <class T, class KV, int kVec, class Pairing>
__global__ void __launch_bounds__(kRopeMaxThreads, 2)
    rope_append_paged_kv_cache(const __grid_constant__ RopeAppendParams params) {
  using Lanes = typename Pairing::template Lanes<kVec>;
  // Single elements come in several units: fewer heads, for as many loads in flight.
  constexpr uint32 kHeads = kVec == 1 ? 2 : kRopeHeadsPerThread;
  constexpr int kUnits = rope_append_units(kVec);
  __shared__ float2 table[kRopeTableSize];  // [tokens_per_block][kVec][num_turning]
  alignas(16) __shared__ float weights[2 * kRopeAppendMaxHeadDim];
  const RopeAppendShape& shape = params.shape;
  pdl_wait();

  const uint32 team_size = shape.team_size;
  const uint32 token_in_block = shape.threads_per_token.quotient(threadIdx.x);
  const uint32 thread = threadIdx.x - token_in_block * shape.threads_per_token.divisor;
  const uint32 lane = thread & (team_size - 1);
  const uint32 token = blockIdx.x * shape.tokens_per_block + token_in_block;
  const uint32 slice_begin = blockIdx.y * shape.heads_per_slice;
  const uint32 slice_end = min(slice_begin + shape.heads_per_slice, shape.num_heads);
  // Threads of no token only keep the others company.
  const bool has_token = token_in_block < shape.tokens_per_block && token < shape.nnz;
  const uint32 end = has_token ? slice_end : 0;
  const uint32 first_head = slice_begin + thread / team_size;
  const bool appends = has_token && slice_end > shape.num_q_heads;
  const bool normalizes = params.norm.q_weight != nullptr;

  int64 angle_position = 0, request = 0, position = 0;
  if (has_token) angle_position = load_index(params.pos_ids, token);
  if (appends) {
    request = load_index(params.batch_indices, token);
    position = load_index(params.positions, token);
  }

  const auto unit = [&](uint32 head, int u) {
    const bool is_v = head >= shape.num_qk_heads;
    return unit_of<Lanes, kVec>(is_v ? shape.v_units : shape.qk_units, shape.num_pairs,
                                lane + u * team_size);
  };
  const auto source_of = [&](uint32 head) {
    if (head < shape.num_q_heads) {
      return static_cast<const T*>(params.q.input) + token * params.q.input_token_stride +
             head * params.q.input_head_stride;
    }
    const bool is_v = head >= shape.num_qk_heads;
    const CacheSide& side = is_v ? params.v : params.k;
    return static_cast<const T*>(side.source) + token * side.source_token_stride +
           (head - (is_v ? shape.num_qk_heads : shape.num_q_heads)) * side.source_head_stride;
  };

  Vec<T, kVec> a[kHeads][kUnits], b[kHeads][kUnits];
  const auto load_heads = [&](uint32 chunk) {
#pragma unroll
    for (uint32 i = 0; i < kHeads; ++i) {
      const uint32 head = chunk + i * shape.head_step;
      if (head >= end) continue;
      const T* source = source_of(head);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const Unit at = unit(head, u);
        if (at.count > 0) a[i][u] = load_once<kVec>(source + at.first);
        if (at.count > 1) b[i][u] = load_once<kVec>(source + at.second);
      }
    }
  };
  load_heads(first_head);

  float2* token_table = table + token_in_block * shape.num_pairs;
  if (has_token && slice_begin < shape.num_qk_heads) {
    const uint32 num_threads = shape.threads_per_token.divisor;
    const auto angle = [&](uint32 pair) {
      return params.cache.values ? cos_sin(params.cache, angle_position, pair)
                                 : cos_sin(params.frequencies, angle_position, pair);
    };
    fill_angles<Lanes>(token_table, shape.num_pairs, shape.turning_units, thread, num_threads,
                       angle);
  }
  if (normalizes) fill_norm_weights<T>(weights, params.norm);
  pdl_launch_dependents();
  __syncthreads();

  TokenPlace place{false, 0, 0};
  if (appends) place = place_of(params.table, request, position);
  float2 angles[kUnits][kVec];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const uint32 idx = lane + u * team_size;
    if (idx >= shape.qk_units.num_turning || !has_token) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      angles[u][i] = token_table[i * shape.qk_units.num_turning + idx];
    }
  }

  // Whole warps go round together, for the sums over teams.
  const uint32 chunk_step = kHeads * shape.head_step;
  for (uint32 offset = 0; offset < shape.heads_per_slice; offset += chunk_step) {
    const uint32 chunk = first_head + offset;
    if (offset > 0) load_heads(chunk);

    float scales[kHeads];
    if (normalizes) {
#pragma unroll
      for (uint32 i = 0; i < kHeads; ++i) {
        const uint32 head = chunk + i * shape.head_step;
        scales[i] = 0.0f;
        if (head >= end || head >= shape.num_qk_heads) continue;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Unit at = unit(head, u);
          float x[kVec];
          a[i][u].to_floats(x);
          if (at.count > 0) scales[i] += squares(x);
          b[i][u].to_floats(x);
          if (at.count > 1) scales[i] += squares(x);
        }
      }
      group_reduce<Sum>(scales, team_size);
#pragma unroll
      for (uint32 i = 0; i < kHeads; ++i) {
        scales[i] = rsqrtf(__fdividef(scales[i], params.norm.head_dim) + params.norm.eps);
      }
    }

#pragma unroll
    for (uint32 i = 0; i < kHeads; ++i) {
      const uint32 head = chunk + i * shape.head_step;
      if (head >= end) continue;
      const bool is_q = head < shape.num_q_heads, is_v = head >= shape.num_qk_heads;
      if (!is_q && !place.exists) continue;
      const CacheSide& side = is_v ? params.v : params.k;
      const uint32 kv_head = head - (is_v ? shape.num_qk_heads : shape.num_q_heads);
      T* q_target = static_cast<T*>(params.q.output) + token * params.q.output_token_stride +
                    head * params.q.output_head_stride;
      KV* target = static_cast<KV*>(side.target) +
                   side.target_strides.offset(place.page, place.slot, kv_head);
      const float inverse_scale = is_q ? 1.0f : inverse_scale_of(side, kv_head);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const Unit at = unit(head, u);
        float x[kVec], y[kVec];
        a[i][u].to_floats(x);
        b[i][u].to_floats(y);
        if (normalizes && !is_v) {
          const float* w = weights + (is_q ? 0 : kRopeAppendMaxHeadDim);
          if (at.count > 0) scale_by(x, scales[i], w + at.first);
          if (at.count > 1) scale_by(y, scales[i], w + at.second);
        }
        if (at.turns) Lanes::rotate(x, y, angles[u]);
        if (is_q) {
          if (at.count > 0) store_scaled(q_target + at.first, x, 1.0f);
          if (at.count > 1) store_scaled(q_target + at.second, y, 1.0f);
        } else {
          if (at.count > 0) store_scaled(target + at.first, x, inverse_scale);
          if (at.count > 1) store_scaled(target + at.second, y, inverse_scale);
        }
      }
    }
  }
}

}  // namespace ridgeline
