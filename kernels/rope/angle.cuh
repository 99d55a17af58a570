// The angle of a position, exact at any position.
//
// A float32 frequency is off by up to 6e-8 of itself, which a position of 1,000,000 makes 0.06
// radians. So a frequency is a 64-bit fraction of a turn per position, and the angle a 64-bit
// product that wraps around: the wrap is the reduction modulo one turn, it costs one integer
// multiplication, and it is exact. What is left is the rounding of the frequency, 2^-56 of a turn
// from the host's double: at position 2^31 an angle is off by 2e-7 radians, at 1,000,000 by 1e-10.
#pragma once

#include "common/types.h"

namespace ridgeline {

// x: cosine, y: sine of position * turns_per_position / 2^64 turns.
__device__ __forceinline__ float2 cos_sin(int64 position, uint64 turns_per_position) {
  const uint64 turns = static_cast<uint64>(position) * turns_per_position;
  // The upper half as a signed number: half turns, from -1 to 1.
  const float half_turns = static_cast<float>(static_cast<int32>(turns >> 32)) * 0x1p-31f;
  float2 result;
  sincospif(half_turns, &result.y, &result.x);
  return result;
}

}  // namespace ridgeline
