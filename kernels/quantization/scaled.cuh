// Vectors times a factor, from one type to another.
#pragma once

#include "common/vec.cuh"

namespace ridgeline {

// target = x * factor, rounded once.
template <class To, class From, int kVec>
__device__ __forceinline__ void store_scaled(To* target, const Vec<From, kVec>& x, float factor) {
  float values[kVec];
  x.to_floats(values);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] *= factor;
  Vec<To, kVec> y;
  y.from_floats(values);
  store(target, y);
}

}  // namespace ridgeline
