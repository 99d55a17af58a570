// Vectors times a factor, from one type to another.
#pragma once

#include "common/vec.cuh"

namespace ridgeline {

// x * factor in float32, rounded once; 8-bit results saturate.
template <class To, class From, int kVec>
__device__ __forceinline__ Vec<To, kVec> scaled(const Vec<From, kVec>& x, float factor) {
  float values[kVec];
  x.to_floats(values);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] *= factor;
  Vec<To, kVec> y;
  y.from_floats(values);
  return y;
}

}  // namespace ridgeline
