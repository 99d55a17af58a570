// A value that the compiler must take as it comes at this point: what depends on it is not computed
// earlier.
#pragma once

namespace ridgeline {

__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ float opaque(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

}  // namespace ridgeline
