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
// written. Launch: a block of kRopeAppendWarps warps for each slice of as many tokens. All SMs;
// head dims up to kRopeAppendMaxHeadDim.
#pragma once

#include "common/arch.cuh"
#include "common/paging.cuh"
#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "page/cast.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"

namespace ridgeline {

// Where the two vectors of a unit begin in their head, and how many of them exist.
struct Unit {
  uint32 first, second;
  uint32 count;
};

template <class Lanes, int kVec>
__device__ __forceinline__ Unit unit_of(const HeadUnits& units, uint32 num_pairs, uint32 idx) {
  if (idx < units.num_turning) {
    return {Lanes::first(idx), Lanes::second(idx, num_pairs), 2};
  }
  const uint32 rest = idx - units.num_turning;
  const uint32 first = units.rotary_dim + rest * kVec;
  const uint32 count = (rest < units.num_rest) + (rest + units.num_rest < units.rest_vecs);
  return {first, first + units.num_rest * kVec, count};
}

// A lane's part of a head.
template <class T, int kVec>
struct HeadPart {
  static constexpr int kUnits = rope_append_units(kVec);
  Vec<T, kVec> a[kUnits], b[kUnits];

  __device__ __forceinline__ void load(const T* head, const Unit (&units)[kUnits]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (units[u].count > 0) a[u] = ridgeline::load<kVec>(head + units[u].first);
      if (units[u].count > 1) b[u] = ridgeline::load<kVec>(head + units[u].second);
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

  // Calls use(u, x, y) with the numbers of each unit, to change, and rounds them.
  template <class To, class Use>
  __device__ __forceinline__ HeadPart<To, kVec> changed(const Use& use) const {
    HeadPart<To, kVec> result;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float x[kVec], y[kVec];
      a[u].to_floats(x);
      b[u].to_floats(y);
      use(u, x, y);
      result.a[u].from_floats(x);
      result.b[u].from_floats(y);
    }
    return result;
  }

  // As they came where nothing is converted.
  template <class To>
  __device__ __forceinline__ HeadPart<To, kVec> scaled(float scale) const {
    if constexpr (sizeof(T) == sizeof(To)) {
      return *this;
    } else {
      return changed<To>([&](int, float (&x)[kVec], float (&y)[kVec]) {
        scale_by(x, scale);
        scale_by(y, scale);
      });
    }
  }

  __device__ __forceinline__ void store(T* head, const Unit (&units)[kUnits]) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (units[u].count > 0) ridgeline::store(head + units[u].first, a[u]);
      if (units[u].count > 1) ridgeline::store(head + units[u].second, b[u]);
    }
  }

  static __device__ __forceinline__ void scale_by(float (&x)[kVec], float scale) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= scale;
  }
};

// The weights of a norm on their way to a warp's shared memory: kVec of a lane at once.
template <class T, int kVec>
struct NormWeights {
  static constexpr int kStep = kVec == 1 ? 1 : 4;
  static constexpr int kPieces = kRopeAppendMaxHeadDim / kWarpSize / kStep;
  Vec<float, kStep> pieces[kPieces];

  __device__ __forceinline__ void load(const HeadNorm& norm, const void* weight) {
    const uint32 head_dim = static_cast<uint32>(norm.head_dim);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32 at = (threadIdx.x % kWarpSize + i * kWarpSize) * kStep;
      if (at >= head_dim) continue;
      if (norm.weights_are_float) {
        pieces[i] = ridgeline::load<kStep>(static_cast<const float*>(weight) + at);
      } else {
        const Vec<T, kStep> piece = ridgeline::load<kStep>(static_cast<const T*>(weight) + at);
        if constexpr (sizeof(T) == 4) {
          pieces[i] = piece;
        } else {
          reinterpret_cast<Vec<T, kStep>&>(pieces[i]) = piece;
        }
      }
    }
  }

  __device__ __forceinline__ void store(const HeadNorm& norm, float* weights) const {
    const uint32 head_dim = static_cast<uint32>(norm.head_dim);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32 at = (threadIdx.x % kWarpSize + i * kWarpSize) * kStep;
      if (at >= head_dim) continue;
      Vec<float, kStep> piece = pieces[i];
      if (sizeof(T) < 4 && !norm.weights_are_float) {
        float values[kStep];
        reinterpret_cast<const Vec<T, kStep>&>(pieces[i]).to_floats(values);
        piece.from_floats(values);
      }
      ridgeline::store(weights + at, piece);
    }
  }
};

// What a warp does to each head of q or of k: the norm, then the rotation.
template <class T, int kVec, class Pairing>
struct Turn {
  using Part = HeadPart<T, kVec>;
  using Lanes = typename Pairing::template Lanes<kVec>;
  using Table = AngleTable<kVec, kRopeAppendMaxPairs>;
  static constexpr int kUnits = Part::kUnits;

  const RopeAppendParams& params;
  const void* weight;  // [head_dim]; null: no norm
  Table& table;        // the warp's
  float* weights;      // the warp's, [kRopeAppendMaxHeadDim]
  uint32 lane;
  uint32 angles_at;  // in shared memory, of the first unit
  Unit units[kUnits];
  NormWeights<T, kVec> loaded;

  __device__ __forceinline__ Turn(const RopeAppendParams& params, const void* weight, uint32 lane,
                                  Table& table, float* weights)
      : params(params),
        weight(weight),
        table(table),
        weights(weights),
        lane(lane),
        angles_at(table.address(lane)) {
    const RopeAppendShape& shape = params.shape;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      units[u] = unit_of<Lanes, kVec>(shape.qk_units, shape.num_pairs, lane + u * shape.team_size);
    }
  }

  __device__ __forceinline__ void load_weights() {
    if (weight != nullptr) loaded.load(params.norm, weight);
  }

  // By all lanes of the warp, when the loads of their heads are on their way.
  __device__ __forceinline__ void prepare(const uint64* turns, int64 position) {
    const RopeAppendShape& shape = params.shape;
    table.template fill<Lanes>(shape.num_pairs, shape.turning_units, [&](uint32 pair) {
      return params.cache.values ? cos_sin(params.cache, position, pair)
                                 : cos_sin(turns[pair], position);
    });
    if (weight != nullptr) loaded.store(params.norm, weights);
    __syncwarp();
  }

  // Of several heads, by all lanes of the warp; unused without a norm.
  template <int kHeads>
  __device__ __forceinline__ void norms_of(float (&norms)[kHeads], const Part* parts) const {
    if (weight == nullptr) return;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) norms[i] = parts[i].sum_of_squares(units);
    group_reduce<Sum>(norms, params.shape.team_size);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      norms[i] = rsqrtf(__fdividef(norms[i], params.norm.head_dim) + params.norm.eps);
    }
  }

  template <class To>
  __device__ __forceinline__ HeadPart<To, kVec> apply(const Part& part, float norm,
                                                      float scale) const {
    return part.template changed<To>([&](int u, float (&x)[kVec], float (&y)[kVec]) {
      if (weight != nullptr) {
        scale_by_weights(x, norm, units[u].count > 0 ? units[u].first : 0);
        scale_by_weights(y, norm, units[u].count > 1 ? units[u].second : 0);
      }
      if (lane + u * params.shape.team_size < params.shape.qk_units.num_turning) rotate(u, x, y);
      if constexpr (sizeof(T) != sizeof(To)) {
        Part::scale_by(x, scale);
        Part::scale_by(y, scale);
      }
    });
  }

  __device__ __forceinline__ void rotate(int u, float (&x)[kVec], float (&y)[kVec]) const {
    float2 angles[kVec];
    Table::read(angles, angles_at + u * params.shape.team_size * Table::kUnitBytes);
    Lanes::rotate(x, y, angles);
  }

  __device__ __forceinline__ void scale_by_weights(float (&x)[kVec], float norm,
                                                   uint32 first) const {
    float w[kVec];
    load<kVec>(weights + first).to_floats(w);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= norm * w[i];
  }
};

// A warp's place in the launch.
struct RopeAppendSlice {
  uint32 token;
  bool is_token;  // no: the last one stands in, and nothing of it is done
  uint32 slice;
  uint32 lane;           // in the team
  uint32 row;            // the team in the warp
  uint32 heads_at_once;  // teams of the warp

  __device__ __forceinline__ uint32 end(uint32 begin, uint32 count, uint32 num_heads) const {
    return is_token ? min(begin + count, num_heads) : 0;
  }
};

template <class T, class KV, int kVec, class Pairing>
__device__ __forceinline__ void rotate_queries(const RopeAppendParams& params,
                                               const RopeAppendSlice& at,
                                               Turns<kRopeAppendMaxPairs>& turns,
                                               AngleTable<kVec, kRopeAppendMaxPairs>& table,
                                               float* weights) {
  using Part = HeadPart<T, kVec>;
  constexpr int kHeads = rope_append_heads(kVec);
  const RopeAppendShape& shape = params.shape;
  const LoadedIndex angle_position(params.pos_ids, at.token);
  Turn<T, kVec, Pairing> turn(params, params.norm.q_weight, at.lane, table, weights);
  const uint32 begin = at.slice * shape.q_heads_per_slice;
  const uint32 end = at.end(begin, shape.q_heads_per_slice, shape.num_q_heads);
  const T* source = static_cast<const T*>(params.q.input) + at.token * params.q.input_token_stride;
  T* target = static_cast<T*>(params.q.output) + at.token * params.q.output_token_stride;
  Part parts[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint32 head = begin + at.row + i * at.heads_at_once;
    if (head < end) parts[i].load(source + head * params.q.input_head_stride, turn.units);
  }
  turn.load_weights();
  turns.fill(params.frequencies, shape.num_pairs);
  __syncthreads();
  turn.prepare(turns.values, angle_position.get(params.pos_ids));
  pdl_launch_dependents();
  float norms[kHeads];
  turn.norms_of(norms, parts);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint32 head = begin + at.row + i * at.heads_at_once;
    if (head >= end) continue;
    turn.template apply<T>(parts[i], norms[i], 1.0f)
        .store(target + head * params.q.output_head_stride, turn.units);
  }
}

template <class T, class KV, int kVec, class Pairing>
__device__ __forceinline__ void append_keys_and_values(const RopeAppendParams& params,
                                                       const RopeAppendSlice& at,
                                                       Turns<kRopeAppendMaxPairs>& turns,
                                                       AngleTable<kVec, kRopeAppendMaxPairs>& table,
                                                       float* weights) {
  using Part = HeadPart<T, kVec>;
  constexpr int kUnits = Part::kUnits;
  constexpr int kHeads = rope_append_heads(kVec) / 2;  // of k and of v each
  const RopeAppendShape& shape = params.shape;
  const LoadedIndex request(params.batch_indices, at.token);
  const LoadedIndex position(params.positions, at.token);
  const LoadedIndex angle_position(params.pos_ids, at.token);
  const GuessedPages guess(params.table, at.token);
  Turn<T, kVec, Pairing> turn(params, params.norm.k_weight, at.lane, table, weights);
  Unit v_units[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    v_units[u] = unit_of<typename Pairing::template Lanes<kVec>, kVec>(
        shape.v_units, 0, at.lane + u * shape.team_size);
  }
  const uint32 begin = (at.slice - shape.num_q_slices) * shape.kv_heads_per_slice;
  const uint32 end = at.end(begin, shape.kv_heads_per_slice, shape.num_kv_heads);
  const T* k_source =
      static_cast<const T*>(params.k.source) + at.token * params.k.source_token_stride;
  const T* v_source =
      static_cast<const T*>(params.v.source) + at.token * params.v.source_token_stride;
  Part k_parts[kHeads], v_parts[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint32 head = begin + at.row + i * at.heads_at_once;
    if (head >= end) continue;
    k_parts[i].load(k_source + head * params.k.source_head_stride, turn.units);
    v_parts[i].load(v_source + head * params.v.source_head_stride, v_units);
  }
  turn.load_weights();
  turns.fill(params.frequencies, shape.num_pairs);
  __syncthreads();
  const PageEntry entry = page_entry_of(params.table, request.get(params.batch_indices),
                                        position.get(params.positions), guess);
  const uint32 page = fetch_page(params.table, entry);
  turn.prepare(turns.values, angle_position.get(params.pos_ids));
  const TokenPlace place = place_of(params.table, entry, page);
  pdl_launch_dependents();

  // All but the stores while the page is looked up. Values first: of fewer bits they take fewer
  // registers.
  HeadPart<KV, kVec> k_results[kHeads], v_results[kHeads];
  const auto scale_of = [&](const CacheSide& side, int i) {
    const uint32 head = begin + at.row + i * at.heads_at_once;
    return sizeof(KV) != sizeof(T) && head < end ? inverse_scale_of(side, head) : 1.0f;
  };
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    v_results[i] = v_parts[i].template scaled<KV>(scale_of(params.v, i));
  }
  float norms[kHeads];
  turn.norms_of(norms, k_parts);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    k_results[i] = turn.template apply<KV>(k_parts[i], norms[i], scale_of(params.k, i));
  }
  KV* k_target =
      static_cast<KV*>(params.k.target) + params.k.target_strides.offset(place.page, place.slot, 0);
  KV* v_target =
      static_cast<KV*>(params.v.target) + params.v.target_strides.offset(place.page, place.slot, 0);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint32 head = begin + at.row + i * at.heads_at_once;
    if (head >= end || !place.exists) continue;
    k_results[i].store(k_target + head * params.k.target_strides.head, turn.units);
    v_results[i].store(v_target + head * params.v.target_strides.head, v_units);
  }
}

// Blocks an SM. Why so many: the more warps, the shorter their waits; with more ptxas spills, and
// before sm_90 it does so earlier.
template <class T, class KV>
inline constexpr int kRopeAppendBlocks = kSm >= 90 ? 12 : 8;

template <class T, class KV, int kVec, class Pairing>
__global__ void __launch_bounds__(kRopeAppendWarps * 32, (kRopeAppendBlocks<T, KV>))
    rope_append_paged_kv_cache(const __grid_constant__ RopeAppendParams params) {
  __shared__ AngleTable<kVec, kRopeAppendMaxPairs> tables[kRopeAppendWarps];
  alignas(16) __shared__ float weights[kRopeAppendWarps][kRopeAppendMaxHeadDim];
  __shared__ Turns<kRopeAppendMaxPairs> turns;
  const RopeAppendShape& shape = params.shape;
  const uint32 warp_in_block = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // Why blocks of one slice: what it is decides which way the whole block goes.
  const uint32 group = shape.num_slices.quotient(blockIdx.x);
  const uint32 token = group * kRopeAppendWarps + warp_in_block;
  const uint32 team_log2 = 31 - __clz(shape.team_size);
  const RopeAppendSlice at{min(token, shape.nnz - 1),
                           token < shape.nnz,
                           blockIdx.x - group * shape.num_slices.divisor,
                           lane & (shape.team_size - 1),
                           lane >> team_log2,
                           kWarpSize >> team_log2};
  pdl_wait();
  if (at.slice < shape.num_q_slices) {
    rotate_queries<T, KV, kVec, Pairing>(params, at, turns, tables[warp_in_block],
                                         weights[warp_in_block]);
  } else {
    append_keys_and_values<T, KV, kVec, Pairing>(params, at, turns, tables[warp_in_block],
                                                 weights[warp_in_block]);
  }
}

}  // namespace ridgeline
