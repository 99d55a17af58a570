// float32 to int8 and back: rounds to nearest even and saturates, infinities too; NaN becomes 0.
#pragma once

#include "common/vec.cuh"

namespace ridgeline {

template <>
__device__ __forceinline__ float to_float<int8>(int8 x) {
  return static_cast<float>(x);
}

template <>
__device__ __forceinline__ int8 from_float<int8>(float x) {
  int32 y;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(y) : "f"(x));
  return static_cast<int8>(y);
}

template <>
struct Quad<int8> {
  static __device__ __forceinline__ uint32 from_floats(const float (&x)[4]) {
    const int32 a = __float2int_rn(x[0]), b = __float2int_rn(x[1]);
    const int32 c = __float2int_rn(x[2]), d = __float2int_rn(x[3]);
    uint32 high, all;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(d), "r"(c), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(b), "r"(a), "r"(high));
    return all;
  }
  static __device__ __forceinline__ void to_floats(uint32 x, float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = static_cast<float>(static_cast<int8>(x >> (8 * i)));
  }
};

}  // namespace ridgeline
