// One pass from a projection to attention: q and k are normalised head by head (if the norm has
// weights), rotated, q is written out, k and v go to their places in a paged pool. float32 inside,
// rounded once, to T for q and to KV for the pool: k = cast(rope(norm(k)) / scale).
//
// q, k [nnz, num_heads, head_dim], v [nnz, num_kv_heads, head_dim_vo] of T, any strides but a last
// one of 1; q's output may be its input. A pool in either layout. kVec elements move at once: 16
// bytes of T, or 1 element where a pointer, a stride or a size does not allow that. A warp owns a
// slice of a token, of heads of q or of heads of k and v (rope_append_plan); a team of team_size
// lanes owns a head, lane i of it units i, i + team_size, ... of two vectors each (HeadUnits).
// Warps never wait for each other: each makes its token's angles itself, in shared memory, while
// its heads are on their way. Tokens without a place in the pool are not appended; their q is
// written. Launch: kRopeAppendWarps warps a block, a warp for each slice. All SMs; head dims up to
// kRopeAppendMaxHeadDim.
#pragma once

#include "common/paging.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "page/cast.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"

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

// A lane's part of a head.
template <class T, int kVec>
struct HeadPart {
  static constexpr int kUnits = rope_append_units(kVec);
  Vec<T, kVec> a[kUnits], b[kUnits];

  __device__ __forceinline__ void load(const T* head, const Unit (&units)[kUnits]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (units[u].count > 0) a[u] = load_once<kVec>(head + units[u].first);
      if (units[u].count > 1) b[u] = load_once<kVec>(head + units[u].second);
    }
  }

  __device__ __forceinline__ float sum_of_squares(const Unit (&units)[kUnits]) const {
    float sum = 0.0f;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float x[kVec], y[kVec];
      a[u].to_floats(x);
      b[u].to_floats(y);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (units[u].count > 0) sum = fmaf(x[i], x[i], sum);
        if (units[u].count > 1) sum = fmaf(y[i], y[i], sum);
      }
    }
    return sum;
  }

  // Calls use(u, x, y) with the numbers of each unit, to change, then stores them.
  template <class To, class Use>
  __device__ __forceinline__ void store_changed(To* head, const Unit (&units)[kUnits],
                                                const Use& use) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float x[kVec], y[kVec];
      a[u].to_floats(x);
      b[u].to_floats(y);
      use(u, x, y);
      Vec<To, kVec> to;
      to.from_floats(x);
      if (units[u].count > 0) store(head + units[u].first, to);
      to.from_floats(y);
      if (units[u].count > 1) store(head + units[u].second, to);
    }
  }

  // As they came where nothing is converted.
  template <class To>
  __device__ __forceinline__ void store_scaled(To* head, const Unit (&units)[kUnits],
                                               float scale) const {
    if constexpr (sizeof(T) == sizeof(To)) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (units[u].count > 0) store(head + units[u].first, a[u]);
        if (units[u].count > 1) store(head + units[u].second, b[u]);
      }
    } else {
      store_changed(head, units, [&](int, float (&x)[kVec], float (&y)[kVec]) {
        scale_by(x, scale);
        scale_by(y, scale);
      });
    }
  }

  static __device__ __forceinline__ void scale_by(float (&x)[kVec], float scale) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= scale;
  }
};

// What a warp does to each head of q or of k: the norm, then the rotation.
template <class T, int kVec, class Pairing>
struct Turn {
  using Part = HeadPart<T, kVec>;
  using Lanes = typename Pairing::template Lanes<kVec>;
  static constexpr int kUnits = Part::kUnits;

  const RopeAppendParams& params;
  uint32 token;
  const void* weight;  // [head_dim]; null: no norm
  float2* table;       // the warp's, [kRopeAppendMaxPairs]
  float* weights;      // the warp's, [kRopeAppendMaxHeadDim]
  Unit units[kUnits];
  float2 angles[kUnits][kVec];

  __device__ __forceinline__ Turn(const RopeAppendParams& params, uint32 token, const void* weight,
                                  uint32 lane_in_team, float2* table, float* weights)
      : params(params), token(token), weight(weight), table(table), weights(weights) {
    const RopeAppendShape& shape = params.shape;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      units[u] =
          unit_of<Lanes, kVec>(shape.qk_units, shape.num_pairs, lane_in_team + u * shape.team_size);
    }
  }

  // By all lanes of the warp, when the loads of their heads are on their way.
  __device__ __forceinline__ void prepare(int64 position, uint32 lane_in_team) {
    const RopeAppendShape& shape = params.shape;
    const uint32 lane = threadIdx.x % kWarpSize;
    const auto angle = [&](uint32 pair) {
      return params.cache.values ? cos_sin(params.cache, position, pair)
                                 : cos_sin(params.frequencies, position, pair);
    };
    if (weight != nullptr) {
      const uint32 head_dim = static_cast<uint32>(params.norm.head_dim);
      for (uint32 i = lane; i < head_dim; i += kWarpSize) {
        weights[i] = params.norm.weights_are_float ? static_cast<const float*>(weight)[i]
                                                   : to_float(static_cast<const T*>(weight)[i]);
      }
    }
    fill_angles<Lanes>(table, shape.num_pairs, shape.turning_units, angle);
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32 idx = lane_in_team + u * shape.team_size;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        angles[u][i] = make_float2(1.0f, 0.0f);
        if (units[u].turns) angles[u][i] = table[i * shape.qk_units.num_turning + idx];
      }
    }
  }

  // Of kHeads heads, by all lanes of the warp; 1 without a norm.
  template <int kHeads>
  __device__ __forceinline__ void norms_of(float (&norms)[kHeads], const Part* parts) const {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      norms[i] = 1.0f;
      if (weight != nullptr) norms[i] = parts[i].sum_of_squares(units);
    }
    if (weight == nullptr) return;
    group_reduce<Sum>(norms, params.shape.team_size);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      norms[i] = rsqrtf(__fdividef(norms[i], params.norm.head_dim) + params.norm.eps);
    }
  }

  template <bool kScales, class To>
  __device__ __forceinline__ void store(const Part& part, float norm, float scale, To* head) const {
    part.store_changed(head, units, [&](int u, float (&x)[kVec], float (&y)[kVec]) {
      if (weight != nullptr) {
        scale_by_weights(x, norm, units[u].count > 0 ? units[u].first : 0);
        scale_by_weights(y, norm, units[u].count > 1 ? units[u].second : 0);
      }
      if (units[u].turns) Lanes::rotate(x, y, angles[u]);
      if constexpr (kScales) {
        Part::scale_by(x, scale);
        Part::scale_by(y, scale);
      }
    });
  }

  __device__ __forceinline__ void scale_by_weights(float (&x)[kVec], float norm,
                                                   uint32 first) const {
    float w[kVec];
    load<kVec>(weights + first).to_floats(w);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= norm * w[i];
  }
};

// Why five blocks an SM: ptxas left alone takes registers for fewer.
template <class T, class KV, int kVec, class Pairing>
__global__ void __launch_bounds__(kRopeAppendWarps * 32, 5)
    rope_append_paged_kv_cache(const __grid_constant__ RopeAppendParams params) {
  using Part = HeadPart<T, kVec>;
  constexpr int kUnits = Part::kUnits;
  constexpr int kHeads = rope_append_heads(kVec);
  __shared__ float2 tables[kRopeAppendWarps][kRopeAppendMaxPairs];
  alignas(16) __shared__ float weights[kRopeAppendWarps][kRopeAppendMaxHeadDim];
  const RopeAppendShape& shape = params.shape;
  const uint32 warp_in_block = threadIdx.x / kWarpSize;
  const uint32 warp = blockIdx.x * kRopeAppendWarps + warp_in_block;
  const uint32 token = shape.num_slices.quotient(warp);
  if (token >= shape.nnz) return;
  const uint32 slice = warp - token * shape.num_slices.divisor;
  const uint32 lane = threadIdx.x % kWarpSize & (shape.team_size - 1);
  const uint32 heads_at_once = kWarpSize / shape.team_size;
  const uint32 row = threadIdx.x % kWarpSize / shape.team_size;
  pdl_wait();

  const int64 angle_position = load_index(params.pos_ids, token);
  Part parts[kHeads];
  float norms[kHeads];
  if (slice < shape.num_q_slices) {
    Turn<T, kVec, Pairing> turn(params, token, params.norm.q_weight, lane, tables[warp_in_block],
                                weights[warp_in_block]);
    const uint32 begin = slice * shape.q_heads_per_slice;
    const uint32 end = min(begin + shape.q_heads_per_slice, shape.num_q_heads);
    const T* source = static_cast<const T*>(params.q.input) + token * params.q.input_token_stride;
    T* target = static_cast<T*>(params.q.output) + token * params.q.output_token_stride;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const uint32 head = begin + row + i * heads_at_once;
      if (head < end) parts[i].load(source + head * params.q.input_head_stride, turn.units);
    }
    turn.prepare(angle_position, lane);
    pdl_launch_dependents();
    turn.norms_of(norms, parts);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const uint32 head = begin + row + i * heads_at_once;
      if (head >= end) continue;
      turn.template store<false>(parts[i], norms[i], 1.0f,
                                 target + head * params.q.output_head_stride);
    }
    return;
  }

  constexpr int kPairs = kHeads / 2;
  constexpr bool kConverts = sizeof(KV) != sizeof(T);
  const int64 request = load_index(params.batch_indices, token);
  const int64 position = load_index(params.positions, token);
  Turn<T, kVec, Pairing> turn(params, token, params.norm.k_weight, lane, tables[warp_in_block],
                              weights[warp_in_block]);
  Unit v_units[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    v_units[u] = unit_of<typename Pairing::template Lanes<kVec>, kVec>(shape.v_units, 0,
                                                                       lane + u * shape.team_size);
  }
  const uint32 begin = (slice - shape.num_q_slices) * shape.kv_heads_per_slice;
  const uint32 end = min(begin + shape.kv_heads_per_slice, shape.num_kv_heads);
  const T* k_source = static_cast<const T*>(params.k.source) + token * params.k.source_token_stride;
  const T* v_source = static_cast<const T*>(params.v.source) + token * params.v.source_token_stride;
  Part v_parts[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32 head = begin + row + i * heads_at_once;
    if (head >= end) continue;
    parts[i].load(k_source + head * params.k.source_head_stride, turn.units);
    v_parts[i].load(v_source + head * params.v.source_head_stride, v_units);
  }
  const PageEntry entry = page_entry_of(params.table, request, position);
  turn.prepare(angle_position, lane);
  const TokenPlace place = place_of(params.table, entry);
  pdl_launch_dependents();
  float k_norms[kPairs];
  turn.norms_of(k_norms, parts);
  if (!place.exists) return;
  KV* k_target =
      static_cast<KV*>(params.k.target) + params.k.target_strides.offset(place.page, place.slot, 0);
  KV* v_target =
      static_cast<KV*>(params.v.target) + params.v.target_strides.offset(place.page, place.slot, 0);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32 head = begin + row + i * heads_at_once;
    if (head >= end) continue;
    const float k_scale = kConverts ? inverse_scale_of(params.k, head) : 1.0f;
    const float v_scale = kConverts ? inverse_scale_of(params.v, head) : 1.0f;
    turn.template store<kConverts>(parts[i], k_norms[i], k_scale,
                                   k_target + head * params.k.target_strides.head);
    v_parts[i].store_scaled(v_target + head * params.v.target_strides.head, v_units, v_scale);
  }
}

}  // namespace ridgeline
