// The order in which filters keep elements: the larger value first, and of equal values the lower
// index. An element's composite is a number that is larger the earlier the element comes, and that
// no other element of the row has, so that a filter's result is one threshold and ties need no
// case of their own.
#pragma once

#include "sampling/params.h"

namespace ridgeline {

// Larger for larger numbers; NaN above all, 0 and -0 alike.
__device__ __forceinline__ uint32 key_of(float x) {
  if (x != x) return 0xffffffffu;
  const uint32 bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32 key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// key, then the index downwards from the largest that index_bits hold.
struct Order {
  uint32 index_bits;
  __device__ __forceinline__ uint64 index_mask() const { return (uint64{1} << index_bits) - 1; }
  __device__ __forceinline__ uint64 first_of(uint32 key) const {
    return static_cast<uint64>(key) << index_bits | index_mask();
  }
  __device__ __forceinline__ uint64 last_of(uint32 key) const {
    return static_cast<uint64>(key) << index_bits;
  }
  __device__ __forceinline__ uint64 composite(float x, uint32 index) const {
    return static_cast<uint64>(key_of(x)) << index_bits | (index_mask() - index);
  }
  __device__ __forceinline__ uint32 index(uint64 composite) const {
    return static_cast<uint32>(index_mask() - (composite & index_mask()));
  }
  __device__ __forceinline__ float value(uint64 composite) const {
    return value_of(static_cast<uint32>(composite >> index_bits));
  }
};

}  // namespace ridgeline
