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

// x: cosine, y: sine of an angle in units of 2^-32 turns; both are off by 1e-7 at most. Polynomials
// on the eighth of a turn around the nearest quarter: the range reduction is on integers, so exact.
__device__ __forceinline__ float2 cos_sin_of_phase(uint32 phase) {
  const uint32 shifted = phase + 0x20000000u;  // its upper two bits: the quarter
  const int32 rest = static_cast<int32>(shifted & 0x3fffffffu) - 0x20000000;
  const float x = static_cast<float>(rest) * 0x1p-31f;  // half turns, from -1/4 to 1/4
  const float square = x * x;
  float sine = fmaf(square, -0.5996909141540527f, 2.550790786743164f);
  sine = fmaf(sine, square, -5.167733192443848f);
  sine = fmaf(sine, x * square, x * 3.1415927410125732f);
  float cosine = fmaf(square, 0.23136429488658905f, -1.3350505828857422f);
  cosine = fmaf(cosine, square, 4.0587077140808105f);
  cosine = fmaf(cosine, square, -4.934802055358887f);
  cosine = fmaf(cosine, square, 1.0f);
  const bool swap = (shifted & 0x40000000u) != 0;
  const uint32 cosine_sign = (shifted + 0x40000000u) & 0x80000000u;
  const uint32 sine_sign = shifted & 0x80000000u;
  return make_float2(__uint_as_float(__float_as_uint(swap ? sine : cosine) ^ cosine_sign),
                     __uint_as_float(__float_as_uint(swap ? cosine : sine) ^ sine_sign));
}

// x: cosine, y: sine of position * turns / 2^64 turns.
__device__ __forceinline__ float2 cos_sin(uint64 turns_per_position, int64 position) {
  const uint64 turns = static_cast<uint64>(position) * turns_per_position;
  return cos_sin_of_phase(static_cast<uint32>(turns >> 32));
}

// A position outside the table is taken as the nearest inside.
__device__ __forceinline__ float2 cos_sin(const CosSinCache& from, int64 position, uint32 pair) {
  const int64 last = from.num_positions - 1;
  const int64 row = position < 0 ? 0 : position < last ? position : last;
  const float* values = from.values + row * from.stride + pair;
  return make_float2(values[0], values[from.num_pairs]);
}

// The cosines and sines of a warp's token, in shared memory, in the order in which Lanes owns them.
// Those of two neighbouring slots of a unit lie together: a lane reads both at once.
template <int kVec, int kMaxPairs>
struct AngleTable {
  static constexpr uint32 kMaxUnits = kMaxPairs / kVec;
  static constexpr uint32 kTogether = kVec == 1 ? 1 : 2;
  static constexpr uint32 kUnitBytes = kTogether * sizeof(float2);  // from one unit to the next

  alignas(16) float2 values[kMaxPairs];

  __device__ __forceinline__ void put(uint32 slot, uint32 unit, float2 angle) {
    values[(slot / kTogether * kMaxUnits + unit) * kTogether + slot % kTogether] = angle;
  }

  // A lane has two pairs on their way at once.
  template <class Lanes, class CosSin>
  __device__ __forceinline__ void fill(uint32 num_pairs, const Divider& num_units,
                                       const CosSin& cos_sin_of) {
    const auto unit_of = [&](uint32 i) { return num_units.remainder(i); };
    const auto slot_of = [&](uint32 i) { return num_units.quotient(i); };
    const auto angle_of = [&](uint32 i) {
      return cos_sin_of(Lanes::pair(unit_of(i), slot_of(i), num_pairs));
    };
#pragma unroll 1
    for (uint32 i = threadIdx.x % kWarpSize; i < num_pairs; i += 2 * kWarpSize) {
      const uint32 other = i + kWarpSize < num_pairs ? i + kWarpSize : i;
      const float2 angle = angle_of(i), other_angle = angle_of(other);
      put(slot_of(i), unit_of(i), angle);
      put(slot_of(other), unit_of(other), other_angle);
    }
  }

  // Where read() finds a unit's.
  __device__ __forceinline__ uint32 address(uint32 unit) const {
    return static_cast<uint32>(__cvta_generic_to_shared(values + unit * kTogether));
  }

  // Why not an ordinary load: with many heads there are no registers to keep what it returns.
  static __device__ __forceinline__ void read(float2 (&angles)[kVec], uint32 address) {
    constexpr uint32 kStep = kMaxUnits * kUnitBytes;
#pragma unroll
    for (int i = 0; i < kVec; i += kTogether) {
      float2& a = angles[i];
      if constexpr (kTogether == 1) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(a.x), "=f"(a.y)
                     : "r"(address)
                     : "memory");
      } else {
        float2& b = angles[i + 1];
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(a.x), "=f"(a.y), "=f"(b.x), "=f"(b.y)
                     : "r"(address + i / kTogether * kStep)
                     : "memory");
      }
    }
  }
};

}  // namespace ridgeline
