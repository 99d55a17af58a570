// Two floats to one 32-bit register of two 16-bit elements (the first in the low half), and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/types.h"

namespace ridgeline {

template <typename T>
struct Pair;

template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ __half2 from_floats(float2 value) {
    return __float22half2_rn(value);
  }
  static __device__ __forceinline__ float2 to_floats(__half2 value) {
    return __half22float2(value);
  }
};

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ __nv_bfloat162 from_floats(float2 value) {
    return __float22bfloat162_rn(value);
  }
  static __device__ __forceinline__ float2 to_floats(__nv_bfloat162 value) {
    const uint32 bits = reinterpret_cast<const uint32&>(value);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
};

template <typename T>
__device__ __forceinline__ uint32 pack_pair(float low, float high) {
  const typename Pair<T>::Type pair = Pair<T>::from_floats(make_float2(low, high));
  return reinterpret_cast<const uint32&>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32 bits) {
  return Pair<T>::to_floats(reinterpret_cast<const typename Pair<T>::Type&>(bits));
}

}  // namespace ridgeline
