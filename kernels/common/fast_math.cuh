// Functions that the hardware has nearly for free, with the error that each of them has here.
#pragma once

#include "common/types.h"

namespace ridgeline {

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// 2^x with a relative error of 2^-22; -inf gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x with a relative error of 2^-23; wants a normal x whose inverse is normal.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x rounded to nearest, for x and 1 / x of normal size (and a mantissa that is not all ones).
// Why not a division: its slow path is a call, around which registers are spilled.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}

// Sine and cosine of an angle given in units of 2^-32 turns: the range reduction is the wrap of the
// integer, so the hardware functions see [-pi, pi) only, where they err by less than 2^-20.
__device__ __forceinline__ void sincos_of_turns(uint32 phase, float& sine, float& cosine) {
  const float angle = static_cast<float>(static_cast<int>(phase)) * 1.4629180792671596e-9f;
  sine = __sinf(angle);
  cosine = __cosf(angle);
}

}  // namespace ridgeline
