// float32 to 8-bit floats and back: rounds to nearest even and saturates, infinities too; NaN stays
// NaN. Before sm_89 the header's own arithmetic does it.
#pragma once

#include <cuda_fp8.h>

#include "common/vec.cuh"

namespace ridgeline {

template <__nv_fp8_interpretation_t kFormat>
__device__ __forceinline__ float fp8_to_float(__nv_fp8_storage_t x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, kFormat)));
}
template <>
__device__ __forceinline__ float to_float<__nv_fp8_e4m3>(__nv_fp8_e4m3 x) {
  return fp8_to_float<__NV_E4M3>(x.__x);
}
template <>
__device__ __forceinline__ float to_float<__nv_fp8_e5m2>(__nv_fp8_e5m2 x) {
  return fp8_to_float<__NV_E5M2>(x.__x);
}

template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  __nv_fp8_e4m3 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return y;
}
template <>
__device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) {
  __nv_fp8_e5m2 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
  return y;
}

template <__nv_fp8_interpretation_t kFormat>
struct Fp8Quad {
  static __device__ __forceinline__ uint32 from_floats(const float (&x)[4]) {
    const uint32 low = __nv_cvt_float2_to_fp8x2(make_float2(x[0], x[1]), __NV_SATFINITE, kFormat);
    const uint32 high = __nv_cvt_float2_to_fp8x2(make_float2(x[2], x[3]), __NV_SATFINITE, kFormat);
    return low | high << 16;
  }
  // The hardware converts two at once.
  static __device__ __forceinline__ void to_floats(uint32 x, float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto two = static_cast<__nv_fp8x2_storage_t>(x >> (16 * i));
      const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, kFormat)));
      y[2 * i] = pair.x;
      y[2 * i + 1] = pair.y;
    }
  }
};
template <>
struct Quad<__nv_fp8_e4m3> : Fp8Quad<__NV_E4M3> {};
template <>
struct Quad<__nv_fp8_e5m2> : Fp8Quad<__NV_E5M2> {};

}  // namespace ridgeline
