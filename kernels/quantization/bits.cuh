// Bytes of which nonzero is a 1, as bits.
#pragma once

#include "common/vec.cuh"

namespace ridgeline {

// A nibble with bit i set where byte i of the word is not 0.
__device__ __forceinline__ uint32 nonzero_bytes(uint32 word) {
  const uint32 low = word & 0x7f7f7f7f;
  const uint32 high = ((low + 0x7f7f7f7f) | word) & 0x80808080;  // the top bit of each such byte
  // Brings them together in the highest nibble; no two partial products share a bit.
  return ((high >> 7) * 0x10204080u) >> 28;
}

// Those of an aligned vector that is read once, the first one lowest.
__device__ __forceinline__ uint32 sixteen_bits(const uint8* source) {
  const uint4 words = load_once<16>(source).words[0];
  return nonzero_bytes(words.x) | nonzero_bytes(words.y) << 4 | nonzero_bytes(words.z) << 8 |
         nonzero_bytes(words.w) << 12;
}

// 8 bits in the order wanted, from 8 with the first one lowest.
__device__ __forceinline__ uint32 ordered(uint32 bits, bool big) {
  return big ? __brev(bits) >> 24 : bits;
}

}  // namespace ridgeline
