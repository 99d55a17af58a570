// The cosine and sine of a position's angle, from frequencies or from a table.
//
// From frequencies the angle is exact at any position. A float32 frequency is off by up to 6e-8 of
// itself, which a position of 1,000,000 makes 0.06 radians. So a frequency is a 64-bit fraction of
// a turn per position, and the angle a 64-bit product that wraps around: the wrap is the reduction
// modulo one turn, it costs one integer multiplication, and it is exact. What is left is the
// rounding of the frequency, 2^-56 of a turn from the host's double: at position 2^31 an angle is
// off by 2e-7 radians, at 1,000,000 by 1e-10.
#pragma once

#include "common/reduce.cuh"
#include "common/types.h"
#include "rope/params.h"

namespace ridgeline {

// Frequencies come as a kernel's parameters, where lanes that read different addresses wait for
// each other: so a block copies them to shared memory once, before it needs them.
template <int kMaxPairs>
struct Turns {
  uint64 values[kMaxPairs];

  // By all threads of the block, which then synchronise.
  __device__ __forceinline__ void fill(const Frequencies& from, uint32 num_pairs) {
    for (uint32 i = threadIdx.x; i < num_pairs; i += blockDim.x) values[i] = from.turns[i];
  }
};

// x: cosine, y: sine of position * turns / 2^64 turns.
__device__ __forceinline__ float2 cos_sin(uint64 turns_per_position, int64 position) {
  const uint64 turns = static_cast<uint64>(position) * turns_per_position;
  // The upper half as a signed number: half turns, from -1 to 1.
  const float half_turns = static_cast<float>(static_cast<int32>(turns >> 32)) * 0x1p-31f;
  float2 result;
  sincospif(half_turns, &result.y, &result.x);
  return result;
}

// A position outside the table is taken as the nearest inside.
__device__ __forceinline__ float2 cos_sin(const CosSinCache& from, int64 position, uint32 pair) {
  const int64 last = from.num_positions - 1;
  const int64 row = position < 0 ? 0 : position < last ? position : last;
  const float* values = from.values + row * from.stride + pair;
  return make_float2(values[0], values[from.num_pairs]);
}

// Fills the [kVec][num_units] cosines and sines of a warp's token, in the order that Lanes owns
// them.
template <class Lanes, class CosSin>
__device__ __forceinline__ void fill_angles(float2* table, uint32 num_pairs,
                                            const Divider& num_units, const CosSin& cos_sin_of) {
  for (uint32 i = threadIdx.x % kWarpSize; i < num_pairs; i += kWarpSize) {
    const uint32 slot = num_units.quotient(i);
    table[i] = cos_sin_of(Lanes::pair(i - slot * num_units.divisor, slot, num_pairs));
  }
}

}  // namespace ridgeline
