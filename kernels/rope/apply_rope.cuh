// Rotary position embedding of q and k: (x, y) -> (x cos - y sin, y cos + x sin) for pair i of a
// head, at the angle of pair i at the token's position; float32, rounded once.
//
// q [nnz, num_q_heads, head_dim], k [nnz, num_k_heads, head_dim] of T, any strides but a last one
// of 1; out of place or in place. kVec elements move at once: 16 bytes, or 1 element when a
// pointer, a stride or num_pairs does not allow that. Pairing is HalfSplit or Interleaved,
// Positions PosIds or RequestOffsets, Angles Frequencies or CosSinCache. A warp owns a slice of a
// token's heads, q's first, then k's (rope_plan); a team of team_size lanes owns a head, lane i of
// it units i, i + team_size, ... of kVec pairs. Warps do not wait for each other's loads: each
// makes its token's angles itself, in shared memory, while its heads are on their way. Launch:
// kRopeWarps warps a block, a warp for each slice. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "rope/angle.cuh"
#include "rope/pairing.cuh"
#include "rope/params.h"
#include "rope/positions.cuh"

namespace ridgeline {

// The heads of one token in one of the two tensors' inputs or outputs, q's first, then k's. Why not
// a choice between two structs: lanes that read different parameters wait for each other.
template <class T>
struct RopeHeadPointers {
  T *q, *k;  // k: where head 0 would be if the heads of q were heads of k
  int64 q_stride, k_stride;
  uint32 num_q_heads;

  __device__ __forceinline__ T* of(uint32 head) const {
    const bool is_q = head < num_q_heads;
    return (is_q ? q : k) + head * (is_q ? q_stride : k_stride);
  }
};

template <class T, int kVec, class Pairing, class Positions, class Angles>
__global__ void __launch_bounds__(kRopeWarps * 32, 6)
    apply_rope(const __grid_constant__ RopeParams<Positions, Angles> params) {
  using Lanes = typename Pairing::template Lanes<kVec>;
  constexpr bool kHasTable = sizeof(Angles) == sizeof(CosSinCache);
  using Table = AngleTable<kVec, kRopeMaxPairs>;
  __shared__ Table tables[kRopeWarps];
  __shared__ Turns<kHasTable ? 1 : kRopeMaxPairs> turns;
  const RopeShape& shape = params.shape;
  const uint32 warp = blockIdx.x * kRopeWarps + threadIdx.x / kWarpSize;
  const uint32 token = shape.num_slices.quotient(warp);
  const bool has_token = token < shape.nnz;
  const uint32 team_log2 = 31 - __clz(shape.team_size);
  const uint32 lane = threadIdx.x % kWarpSize & (shape.team_size - 1);
  const uint32 heads_at_once = kWarpSize >> team_log2;
  const uint32 begin = (warp - token * shape.num_slices.divisor) * shape.heads_per_slice;
  const uint32 end = has_token ? min(begin + shape.heads_per_slice, shape.num_heads) : 0;
  const uint32 first_head = begin + (threadIdx.x % kWarpSize >> team_log2);
  const uint32 num_units = shape.num_units.divisor;
  const RopeTensor &q = params.q, &k = params.k;
  const RopeHeadPointers<const T> inputs{
      static_cast<const T*>(q.input) + token * q.input_token_stride,
      static_cast<const T*>(k.input) + token * k.input_token_stride -
          shape.num_q_heads * k.input_head_stride,
      q.input_head_stride, k.input_head_stride, shape.num_q_heads};
  const auto outputs_of_token = [&] {
    return RopeHeadPointers<T>{static_cast<T*>(q.output) + token * q.output_token_stride,
                               static_cast<T*>(k.output) + token * k.output_token_stride -
                                   shape.num_q_heads * k.output_head_stride,
                               q.output_head_stride, k.output_head_stride, shape.num_q_heads};
  };

  Vec<T, kVec> a[kRopeHeads], b[kRopeHeads];
  const auto load_unit = [&](uint32 unit) {
#pragma unroll
    for (uint32 i = 0; i < kRopeHeads; ++i) {
      const uint32 head = first_head + i * heads_at_once;
      if (head >= end || unit >= num_units) continue;
      const T* input = inputs.of(head);
      a[i] = load<kVec>(input + Lanes::first(unit));
      b[i] = load<kVec>(input + Lanes::second(unit, shape.num_pairs));
    }
  };
  pdl_wait();
  PositionOf<Positions> position_of;
  if (has_token) position_of.load(params.positions, token);
  load_unit(lane);
  if constexpr (!kHasTable) {
    turns.fill(params.angles, shape.num_pairs);
    __syncthreads();
  }
  if (!has_token) return;

  Table& table = tables[threadIdx.x / kWarpSize];
  const int64 position = position_of.get(params.positions, token);
  table.template fill<Lanes>(shape.num_pairs, shape.num_units, [&](uint32 pair) {
    if constexpr (kHasTable) {
      return cos_sin(params.angles, position, pair);
    } else {
      return cos_sin(turns.values[pair], position);
    }
  });
  pdl_launch_dependents();
  __syncwarp();

  const RopeHeadPointers<T> outputs = outputs_of_token();
  for (uint32 unit = lane; unit < num_units; unit += shape.team_size) {
    if (unit != lane) load_unit(unit);
    float2 angles[kVec];
    Table::read(angles, table.address(unit));
#pragma unroll
    for (uint32 i = 0; i < kRopeHeads; ++i) {
      const uint32 head = first_head + i * heads_at_once;
      if (head >= end) continue;
      rotate<Lanes>(a[i], b[i], angles);
      // Why not streaming stores: attention and the cache append read the output next.
      T* output = outputs.of(head);
      store(output + Lanes::first(unit), a[i]);
      store(output + Lanes::second(unit, shape.num_pairs), b[i]);
    }
  }
  // What lies beyond rotary_dim is copied unchanged.
  if (shape.num_copied_vecs == 0) return;
  for (uint32 head = first_head; head < end; head += heads_at_once) {
    for (uint32 vec = lane; vec < shape.num_copied_vecs; vec += shape.team_size) {
      const uint32 element = 2 * shape.num_pairs + vec * kVec;
      store(outputs.of(head) + element, load<kVec>(inputs.of(head) + element));
    }
  }
}

}  // namespace ridgeline
