// Rotary embedding of the rows of a swizzled tile in shared memory. Pair d of a row is (d, d +
// head_dim / 2); at position p it turns by p * turns * ratio^d full turns.
//
// Phases are fixed point, 2^64 to a turn, so that position times step wraps to exactly the fraction
// of a turn that counts: a position of a million loses nothing.
#pragma once

#include "common/fast_math.cuh"
#include "common/opaque.cuh"
#include "common/pack.cuh"
#include "common/swizzle.cuh"
#include "common/types.h"

namespace ridgeline {

__device__ __forceinline__ void fill_rotation_table(uint64* table, int num_pairs, double turns,
                                                    double ratio, int thread, int num_threads) {
  for (int pair = thread; pair < num_pairs; pair += num_threads) {
    double step = turns;
    double power = ratio;
    for (int bits = pair; bits > 0; bits >>= 1) {
      if (bits & 1) step *= power;
      power *= power;
    }
    step -= floor(step);
    table[pair] = static_cast<uint64>(step * 18446744073709551616.0);
  }
}

// Rotates rows of kDim elements, of which head_dim count, at the positions that position_of(row)
// gives. A thread takes four pairs at a time: head_dim is a multiple of 8, so both halves of them
// are whole 8-byte words.
template <typename T, int kDim, typename PositionOf>
__device__ __forceinline__ void rotate_rows(unsigned char* tile, int num_rows, int head_dim,
                                            const uint64* table, int thread, int num_threads,
                                            PositionOf position_of) {
  const int half = opaque(head_dim) / 2;
  const int units_per_row = half / 4;
#pragma unroll 1
  for (int unit = thread; unit < num_rows * units_per_row; unit += num_threads) {
    const int row = unit / units_per_row;
    const int first = unit % units_per_row * 4;
    const uint64 position = static_cast<uint64>(static_cast<int64>(position_of(row)));
    const auto word_of = [&](int element) {
      const uint32 offset =
          swizzled_offset<kDim* int(sizeof(T))>(row, element / 8) + element % 8 * int(sizeof(T));
      return reinterpret_cast<uint2*>(tile + offset);
    };
    uint2* low_word = word_of(first);
    uint2* high_word = word_of(first + half);
    uint32 low[2] = {low_word->x, low_word->y};
    uint32 high[2] = {high_word->x, high_word->y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 a = unpack_pair<T>(low[i]);
      const float2 b = unpack_pair<T>(high[i]);
      float2 sine, cosine;
      sincos_of_turns(static_cast<uint32>(position * table[first + 2 * i] >> 32), sine.x, cosine.x);
      sincos_of_turns(static_cast<uint32>(position * table[first + 2 * i + 1] >> 32), sine.y,
                      cosine.y);
      low[i] = pack_pair<T>(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y);
      high[i] = pack_pair<T>(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y);
    }
    *low_word = make_uint2(low[0], low[1]);
    *high_word = make_uint2(high[0], high[1]);
  }
}

}  // namespace ridgeline
