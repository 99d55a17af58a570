// float32 to 8-bit floats: rounds to nearest even and saturates, infinities too; NaN stays NaN.
// Before sm_89 the header's own arithmetic does it.
#pragma once

#include <cuda_fp8.h>

#include "common/vec.cuh"

namespace ridgeline {

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

}  // namespace ridgeline
