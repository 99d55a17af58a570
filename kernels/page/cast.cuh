// What happens to a vector on its way into a cache: it is copied byte for byte, or converted.
#pragma once

#include "common/fast_math.cuh"
#include "common/fp8.cuh"
#include "common/scaled.cuh"
#include "page/params.h"

namespace ridgeline {

__device__ __forceinline__ float inverse_scale_of(const CacheSide& side, uint32 head) {
  return side.scales ? reciprocal(side.scales[head * side.scale_stride]) : side.inverse_scale;
}

template <int kBytes>
struct Copy {
  using From = uint8;
  using To = uint8;
  static constexpr int kVec = kBytes;
  static constexpr bool kScales = false;

  static __device__ __forceinline__ Vec<uint8, kVec> apply(const Vec<uint8, kVec>& x, float) {
    return x;
  }
};

// x * inverse_scale in float32, rounded once. 8-bit targets saturate.
template <class F, class T, int kElements>
struct Convert {
  using From = F;
  using To = T;
  static constexpr int kVec = kElements;
  static constexpr bool kScales = true;

  static __device__ __forceinline__ Vec<T, kVec> apply(const Vec<F, kVec>& x, float inverse_scale) {
    return scaled<T>(x, inverse_scale);
  }
};

}  // namespace ridgeline
