// A step with a soft cap where all rows can have one origin: logits stay between -cap and cap, so
// float32 and bf16 hold the exponentials of all of them. No step asks for the largest, and the
// first half of a step's exponentials is taken among the products with the second half's keys.
#pragma once

#include "attention/tile_math.cuh"

namespace ridgeline {

// From products q * k to the exponents of exponentials, in powers of two and less the origin:
//   cap * tanh(x) = cap - 2 * cap / (1 + 2^(factor * product)).
// A logit's error is 8e-7 * cap at most.
struct CappedLogits {
  static constexpr float kSmall = 0x1p-60f;  // keeps the product of two sums below 2^128
  float factor;
  float range;    // from the lowest exponent to the highest, * kSmall
  float highest;  // so that the lowest is no less than kLowest

  __device__ __forceinline__ CappedLogits(float scale, float cap) {
    constexpr float kLowest = -112.0f;
    factor = 2.0f * kLog2E * scale * reciprocal(cap);
    const float whole = 2.0f * kLog2E * cap;
    range = whole * kSmall;
    highest = fmaxf(0.0f, whole + kLowest);
  }

  // The logit whose exponential is 1.
  __device__ __forceinline__ float origin(float cap) const { return cap - highest * kLn2; }

  // Two of one row. One reciprocal serves both: special functions are what a step waits for.
  __device__ __forceinline__ void operator()(float& first, float& second) const {
    const float one = __saturatef(fmaf(exp2_fast(first * factor), kSmall, kSmall));
    const float other = __saturatef(fmaf(exp2_fast(second * factor), kSmall, kSmall));
    const float minus = reciprocal_fast(one * other) * -range;
    first = fmaf(minus, other, highest);
    second = fmaf(minus, one, highest);
  }
};

// Takes a pair of a step's exponentials.
template <typename Traits>
__device__ __forceinline__ void take_capped(Exponentials<Traits>& exponentials, int group, int pair,
                                            const Logits<Traits>& products,
                                            const CappedLogits& capped) {
  const int n = exponentials.fragment(group, pair);
  float first = products[pair / 4][n][pair % 2 * 2];
  float second = products[pair / 4][n][pair % 2 * 2 + 1];
  capped(first, second);
  exponentials.add(group, pair, exp2_fast(first), exp2_fast(second));
}

// await() waits until the tiles that start_copies(i) overwrites are read; mask(logits) makes those
// of keys that a row does not see -inf, where not all rows see all.
template <typename Traits, typename Await, typename Mask, typename StartCopies>
__device__ __forceinline__ void attend_capped(RowState<Traits>& state, const CappedLogits& capped,
                                              const QueryFragments<Traits>& query, uint32 key_tile,
                                              uint32 key_lane_offset, uint32 value_tile,
                                              uint32 value_lane_offset, bool seen_by_all,
                                              Await await, Mask mask, StartCopies start_copies) {
  constexpr int kGroups = Exponentials<Traits>::kGroups;
  constexpr int kPairs = Exponentials<Traits>::kPairs;
  constexpr int kReads = Traits::kQk / 16;
  constexpr int kMiddle = Traits::kKeyFrags / 2;
  // Why behind the last: the compiler starts no reads of fragments ahead of a wait.
  const auto await_last = [&](int k) {
    if (k == kReads - 1) await();
  };
  Logits<Traits> logits;
  Exponentials<Traits> exponentials;
  // Why opaque: else what the two ways share is moved from register to register.
  if (opaque(int(seen_by_all)) != 0) {
    constexpr int kEarly = kMiddle / 2 * kPairs;
    multiply_keys<Traits, 0, kMiddle>(logits, query, key_tile, key_lane_offset, await_last);
    multiply_keys<Traits, kMiddle>(logits, query, key_tile, key_lane_offset, [&](int k) {
#pragma unroll
      for (int i = kEarly * k / kReads; i < kEarly * (k + 1) / kReads; ++i) {
        take_capped<Traits>(exponentials, i / kPairs, i % kPairs, logits, capped);
      }
    });
    multiply_values<Traits, kMiddle / 2>(
        state, exponentials,
        [&](int group, int pair) {
          take_capped<Traits>(exponentials, group, pair, logits, capped);
        },
        value_tile, value_lane_offset, start_copies);
  } else {
    multiply_keys<Traits>(logits, query, key_tile, key_lane_offset, await_last);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
        for (int i = 0; i < Traits::kKeyFrags / 2; ++i) {
          float (&four)[4] = logits[m][part * (Traits::kKeyFrags / 2) + i];
          capped(four[0], four[1]);
          capped(four[2], four[3]);
        }
      }
      mask(logits);
#pragma unroll
      for (int i = 0; i < kGroups / 2 * kPairs; ++i) {
        const int group = part * (kGroups / 2) + i / kPairs;
        const int pair = i % kPairs;
        const float* two = &logits[pair / 4][exponentials.fragment(group, pair)][pair % 2 * 2];
        exponentials.add(group, pair, exp2_fast(two[0]), exp2_fast(two[1]));
      }
    }
    multiply_values<Traits, kGroups>(
        state, exponentials, [](int, int) {}, value_tile, value_lane_offset, start_copies);
  }
}

}  // namespace ridgeline
