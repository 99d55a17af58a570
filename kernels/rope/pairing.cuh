// Which elements of a head turn together.
//
// A lane owns kVec pairs: the vectors at first(lane) and second(lane), in both layouts the same
// coalesced accesses. pair(lane, slot) says whose angle is the slot-th of the lane, and rotate()
// turns both vectors by angles in slot order.
#pragma once

#include "common/types.h"
#include "common/vec.cuh"

namespace ridgeline {

__device__ __forceinline__ void rotate_pair(float& x, float& y, float2 angle) {
  const float rotated_x = x * angle.x - y * angle.y;
  y = y * angle.x + x * angle.y;
  x = rotated_x;
}

// (i, i + num_pairs): the layout of Llama in Hugging Face Transformers, of GPT-NeoX.
template <int kVec>
struct HalfSplitLanes {
  static __device__ __forceinline__ uint32 first(uint32 lane) { return lane * kVec; }
  static __device__ __forceinline__ uint32 second(uint32 lane, uint32 num_pairs) {
    return num_pairs + lane * kVec;
  }
  static __device__ __forceinline__ uint32 pair(uint32 lane, uint32 slot, uint32) {
    return lane * kVec + slot;
  }
  static __device__ __forceinline__ void rotate(float (&x)[kVec], float (&y)[kVec],
                                                const float2 (&angles)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) rotate_pair(x[i], y[i], angles[i]);
  }
};

// (2i, 2i + 1): the layout of GPT-J and of Llama's own release. Both elements of a pair lie in one
// vector; slots 0 .. kVec / 2 - 1 are the first vector's pairs, the others the second's.
template <int kVec>
struct InterleavedLanes {
  static __device__ __forceinline__ uint32 first(uint32 lane) { return lane * kVec; }
  static __device__ __forceinline__ uint32 second(uint32 lane, uint32 num_pairs) {
    return num_pairs + lane * kVec;
  }
  static __device__ __forceinline__ uint32 pair(uint32 lane, uint32 slot, uint32 num_pairs) {
    constexpr uint32 kHalf = kVec / 2;
    return lane * kHalf + (slot < kHalf ? slot : num_pairs / 2 + slot - kHalf);
  }
  static __device__ __forceinline__ void rotate(float (&x)[kVec], float (&y)[kVec],
                                                const float2 (&angles)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      rotate_pair(x[2 * i], x[2 * i + 1], angles[i]);
      rotate_pair(y[2 * i], y[2 * i + 1], angles[kVec / 2 + i]);
    }
  }
};

// Single elements: the pair is the two accesses.
template <>
struct InterleavedLanes<1> : HalfSplitLanes<1> {
  static __device__ __forceinline__ uint32 first(uint32 lane) { return 2 * lane; }
  static __device__ __forceinline__ uint32 second(uint32 lane, uint32) { return 2 * lane + 1; }
};

// Both vectors of a lane, rounded once.
template <class Lanes, class T, int kVec>
__device__ __forceinline__ void rotate(Vec<T, kVec>& a, Vec<T, kVec>& b,
                                       const float2 (&angles)[kVec]) {
  float x[kVec], y[kVec];
  a.to_floats(x);
  b.to_floats(y);
  Lanes::rotate(x, y, angles);
  a.from_floats(x);
  b.from_floats(y);
}

// The names in kernel keys.
struct HalfSplit {
  template <int kVec>
  using Lanes = HalfSplitLanes<kVec>;
};
struct Interleaved {
  template <int kVec>
  using Lanes = InterleavedLanes<kVec>;
};

}  // namespace ridgeline
