// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// The key is a row's seed; the counter is its offset and the number of the draw within the row. So
// a draw depends on (seed, offset) alone, and the CPU makes the same one.
#pragma once

#include "sampling/params.h"

namespace ridgeline {

__device__ __forceinline__ uint64 philox(uint64 seed, uint64 offset, uint32 draw) {
  uint32 key[2] = {static_cast<uint32>(seed), static_cast<uint32>(seed >> 32)};
  uint32 x[4] = {static_cast<uint32>(offset), static_cast<uint32>(offset >> 32), draw, 0};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64 a = static_cast<uint64>(0xD2511F53u) * x[0];
    const uint64 b = static_cast<uint64>(0xCD9E8D57u) * x[2];
    x[0] = static_cast<uint32>(b >> 32) ^ x[1] ^ key[0];
    x[1] = static_cast<uint32>(b);
    x[2] = static_cast<uint32>(a >> 32) ^ x[3] ^ key[1];
    x[3] = static_cast<uint32>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<uint64>(x[1]) << 32 | x[0];
}

// 64 random bits of a row.
__device__ __forceinline__ uint64 random_bits(const RandomKeys& keys, uint32 row, uint32 draw) {
  const int64 seed = keys.seeds[row * keys.seed_stride];
  const int64 offset = keys.offsets ? keys.offsets[row * keys.offset_stride] : 0;
  return philox(static_cast<uint64>(seed), static_cast<uint64>(offset), draw);
}

}  // namespace ridgeline
