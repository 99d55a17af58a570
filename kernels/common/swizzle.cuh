// Shared-memory tiles whose rows are a multiple of 128 bytes. The 16-byte chunks within each 128
// bytes of a row are permuted by XOR with the row's last three bits, so that eight consecutive rows
// of one column of chunks lie in eight different bank groups: ldmatrix and 16-byte row copies both
// run without conflicts.
#pragma once

#include "common/types.h"

namespace ridgeline {

// Byte offset of a row's 16-byte chunk in a tile with rows of kRowBytes.
template <int kRowBytes>
__device__ __forceinline__ uint32 swizzled_offset(int row, int chunk) {
  static_assert(kRowBytes % 128 == 0, "rows are whole 128-byte lines");
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// What a lane hands to ldmatrix.x4 for the fragment whose first 16-byte chunk is `chunk` (even),
// `row` rows (a multiple of 8) further down. `lane_offset` is its offset for row 0 and chunk 0 in a
// tile aligned to 128 bytes: the chunk's place within its 128 bytes is XORed in, the rest is added,
// so one register serves all tiles.
template <int kRowBytes>
__device__ __forceinline__ uint32 fragment_address(uint32 tile, uint32 lane_offset, int row,
                                                   int chunk) {
  return (lane_offset ^ ((chunk & 7) << 4)) + (tile + row * kRowBytes + (chunk & ~7) * 16);
}

}  // namespace ridgeline
