// packed[i] = bits x[8 i] to x[8 i + 7], the first one lowest ("little") or highest ("big");
// missing ones at the end are 0.
//
// x [num_bits] of bytes, nonzero is a 1, any stride with kVec = 1; kVec = 16 loads 16 bytes at once
// and needs a stride of 1 and an aligned x. A thread owns 16 bits, two bytes of packed. All SMs.
#pragma once

#include "common/vec.cuh"
#include "quantization/params.h"

namespace ridgeline {

// A nibble with bit i set where byte i of the word is not 0.
__device__ __forceinline__ uint32 nonzero_bytes(uint32 word) {
  const uint32 low = word & 0x7f7f7f7f;
  const uint32 high = ((low + 0x7f7f7f7f) | word) & 0x80808080;  // the top bit of each such byte
  // Brings them together in the highest nibble; no two partial products share a bit.
  return ((high >> 7) * 0x10204080u) >> 28;
}

// 8 bits in the order wanted, from 8 with the first one lowest.
__device__ __forceinline__ uint32 ordered(uint32 bits, bool big) {
  return big ? __brev(bits) >> 24 : bits;
}

template <int kVec>
__global__ void __launch_bounds__(kPackThreads)
    packbits(const __grid_constant__ PackbitsParams params) {
  const int64 first = (int64{blockIdx.x} * kPackThreads + threadIdx.x) * 16;
  if (first >= params.num_bits) return;
  uint32 bits = 0;
  if (kVec == 16 && first + 16 <= params.num_bits) {
    const Vec<uint8, 16> x = load_once<16>(params.x + first);
    const uint4 words = x.words[0];
    bits = nonzero_bytes(words.x) | nonzero_bytes(words.y) << 4 | nonzero_bytes(words.z) << 8 |
           nonzero_bytes(words.w) << 12;
  } else {
    for (int i = 0; i < 16 && first + i < params.num_bits; ++i) {
      bits |= static_cast<uint32>(params.x[(first + i) * params.x_stride] != 0) << i;
    }
  }
  params.packed[first / 8] = static_cast<uint8>(ordered(bits & 0xff, params.big));
  if (first + 8 < params.num_bits) {
    params.packed[first / 8 + 1] = static_cast<uint8>(ordered(bits >> 8, params.big));
  }
}

}  // namespace ridgeline
