// The arithmetic of a step: products with keys, mask, online softmax, products with values. All of
// it on a warp's fragments: lane l holds of each 16x8 fragment the rows g = l / 4 and g + 8,
// columns 2 * (l % 4) and the next.
#pragma once

#include "attention/tile_traits.cuh"
#include "common/fast_math.cuh"
#include "common/ldmatrix.cuh"
#include "common/mma.cuh"
#include "common/opaque.cuh"
#include "common/pack.cuh"
#include "common/swizzle.cuh"

namespace ridgeline {

// What a warp carries from step to step, for its rows.
template <typename Traits>
struct RowState {
  float out[Traits::kMFrags][Traits::kVoFrags][4];  // sum of exponential * value
  float maximum[Traits::kMFrags][2];                // origin of the exponentials: a logit
  float sum[Traits::kMFrags][2];                    // this lane's share of the sum of exponentials

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kVoFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = -kInfinity;
        sum[m][half] = 0.0f;
      }
    }
  }
};

template <typename Traits>
using Logits = float[Traits::kMFrags][Traits::kKeyFrags][4];

// A warp's query fragments: held in registers, or read again from shared memory at each step, or
// some of them so and the others so.
template <typename Traits>
struct QueryFragments {
  static constexpr int kHeld = Traits::kHeldQuery;

  uint32 tile;
  uint32 lane_offset;
  uint32 held[kHeld > 0 ? kHeld : 1][Traits::kMFrags][4];

  __device__ __forceinline__ QueryFragments(uint32 tile, uint32 lane_offset)
      : tile(tile), lane_offset(lane_offset) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) read(held[k], k);
  }

  __device__ __forceinline__ void get(uint32 (&fragments)[Traits::kMFrags][4], int k) const {
    if (k < kHeld) {
#pragma unroll
      for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[m][i] = held[k][m][i];
      }
    } else {
      read(fragments, k);
    }
  }

 private:
  __device__ __forceinline__ void read(uint32 (&fragments)[Traits::kMFrags][4], int k) const {
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
      ldmatrix_x4(fragments[m],
                  fragment_address<Traits::kQueryRowBytes>(tile, lane_offset, m * 16, 2 * k));
    }
  }
};

// The step from shared memory to the operand B of two neighbouring products, by the element type of
// the cache. For 16-bit elements it is the identity; a narrower type is widened to T here.
template <typename T, typename Element, int kRowBytes>
__device__ __forceinline__ void key_operand(uint32 (&operand)[4], uint32 tile, uint32 lane_offset,
                                            int key, int chunk) {
  static_assert(sizeof(Element) == sizeof(T), "elements of another width need a conversion here");
  ldmatrix_x4(operand, fragment_address<kRowBytes>(tile, lane_offset, key, chunk));
}

template <typename T, typename Element, int kRowBytes>
__device__ __forceinline__ void value_operand(uint32 (&operand)[4], uint32 tile, uint32 lane_offset,
                                              int key, int chunk) {
  static_assert(sizeof(Element) == sizeof(T), "elements of another width need a conversion here");
  ldmatrix_x4_transposed(operand, fragment_address<kRowBytes>(tile, lane_offset, key, chunk));
}

// The products with the keys of fragments kBegin to kEnd. beside(k) runs after those with the k-th
// 16 elements of the rows.
template <typename Traits, int kBegin = 0, int kEnd = Traits::kKeyFrags, typename Beside>
__device__ __forceinline__ void multiply_keys(Logits<Traits>& logits,
                                              const QueryFragments<Traits>& query, uint32 key_tile,
                                              uint32 key_lane_offset, Beside beside) {
  using T = typename Traits::T;
  constexpr bool kFp16 = Traits::Variant::kFp16Logits;
  uint32 halves[Traits::kMFrags][Traits::kKeyFrags][2];
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[m][n][i] = 0.0f;
      halves[m][n][0] = halves[m][n][1] = 0;
    }
  }
  // Why not all of a row with two fragments of rows: the compiler would start so many reads ahead
  // that accumulators spill, where no wait stands between them.
  constexpr bool kWholeRow =
      Traits::kHeldQuery > 0 || Traits::kMFrags == 1 || Traits::kCountsArrivals;
  constexpr int kUnroll = kWholeRow ? Traits::kQk / 16 : 4;
#pragma unroll kUnroll
  for (int k = 0; k < Traits::kQk / 16; ++k) {
    uint32 a[Traits::kMFrags][4];
    query.get(a, k);
#pragma unroll
    for (int n = kBegin; n < kEnd; n += 2) {
      uint32 b[4];
      key_operand<T, typename Traits::Element, Traits::kKeyRowBytes>(b, key_tile, key_lane_offset,
                                                                     n * 8, 2 * k);
#pragma unroll
      for (int m = 0; m < Traits::kMFrags; ++m) {
        if constexpr (kFp16) {
          mma_m16n8k16_fp16_sum(halves[m][n], a[m], b[0], b[1]);
          mma_m16n8k16_fp16_sum(halves[m][n + 1], a[m], b[2], b[3]);
        } else {
          mma_m16n8k16<T>(logits[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(logits[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    beside(k);
  }
  if constexpr (kFp16) {
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kKeyFrags; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = unpack_pair<__half>(halves[m][n][half]);
          logits[m][n][2 * half] = pair.x;
          logits[m][n][2 * half + 1] = pair.y;
        }
      }
    }
  }
}

// The keys that row `row` of the warp's rows sees, among those of the work item.
template <typename Traits>
__device__ __forceinline__ KeyRange row_keys(const AttentionParams& params, const Request& request,
                                             const WorkItem& work, int row) {
  const int query = params.group_size.quotient(work.q_row_begin + row);
  const KeyRange keys = Traits::Variant::mask(params, request, query);
  return {max(keys.begin, work.kv_begin), min(keys.end, work.kv_end)};
}

// Logits of keys to the left of what a row sees, or to the right, become -inf. `first_key` is the
// first of this warp's step, warp_row its first row. Why opaque: computed ahead of the loop, the
// bounds of the rows would hold registers that the accumulators need.
template <typename Traits, bool kLeft = true, bool kRight = true>
__device__ __forceinline__ void mask_logits(Logits<Traits>& logits, const AttentionParams& params,
                                            const Request& request, const WorkItem& work,
                                            int warp_row, int first_key) {
  const int lane = threadIdx.x % 32;
  warp_row = opaque(warp_row);
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange keys =
          row_keys<Traits>(params, request, work, warp_row + m * 16 + half * 8 + lane / 4);
      const int lane_key = first_key + 2 * (lane % 4);
      const int begin = keys.begin - lane_key;
      const int end = keys.end - lane_key;
#pragma unroll
      for (int n = 0; n < Traits::kKeyFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = n * 8 + i;
          if ((kLeft && key < begin) || (kRight && key >= end)) {
            logits[m][n][2 * half + i] = -kInfinity;
          }
        }
      }
    }
  }
}

// Beyond this, rounding of logit * scale is no longer small beside 1.
inline constexpr float kFarLogit = 1024.0f;
// Exponentials may grow to 2^kHeadroom before a row's origin moves.
inline constexpr float kHeadroom = 8.0f;

// This lane's largest logit of each row.
template <typename Traits>
__device__ __forceinline__ float lane_maximum(const Logits<Traits>& logits, int m, int half) {
  float maximum = fmaxf(logits[m][0][2 * half], logits[m][0][2 * half + 1]);
#pragma unroll
  for (int n = 1; n < Traits::kKeyFrags; ++n) {
    maximum = fmaxf(maximum, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
  }
  return maximum;
}

// The same if it is not negative, or no number if one is among them, else something negative:
// floats above 0 compare as whole numbers do, of which sm_90 compares three at a time.
template <typename Traits>
__device__ __forceinline__ float lane_maximum_above_0(const Logits<Traits>& logits, int m,
                                                      int half) {
  constexpr int kCount = 2 * Traits::kKeyFrags;
  const auto at = [&](int i) { return __float_as_int(logits[m][i / 2][2 * half + i % 2]); };
  int maximum = at(0);
#pragma unroll
  for (int i = 1; i < kCount - 1; i += 2) maximum = max(max(maximum, at(i)), at(i + 1));
  return __int_as_float(max(maximum, at(kCount - 1)));
}

// Whether an exponential of this lane would grow too large, or an origin is far or none.
template <typename Traits>
__device__ __forceinline__ bool outgrow_origins(const float (&offset)[Traits::kMFrags][2],
                                                const Logits<Traits>& logits, float scale) {
  bool outgrow = false;
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float largest = lane_maximum<Traits>(logits, m, half);
      outgrow |= fmaf(largest, scale, -offset[m][half]) > kHeadroom;
      outgrow |= fabsf(offset[m][half]) > kFarLogit;
    }
  }
  return outgrow;
}

// What is subtracted from logit * scale, and whether origins must move first. A row's origin is a
// logit that it has seen, and stays while no exponential grows beyond 2^kHeadroom: most steps move
// none in a whole warp, and ask no other lane for its largest logit. Without an origin (-inf) and
// with a far one the answer is always yes.
template <typename Traits>
__device__ __forceinline__ bool find_offsets(float (&offset)[Traits::kMFrags][2],
                                             const RowState<Traits>& state,
                                             const Logits<Traits>& logits, float scale) {
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) offset[m][half] = state.maximum[m][half] * scale;
  }
  if constexpr (Traits::kCountsArrivals) {
    // Origins that are not negative, as nearly all are, are outgrown by positive logits only.
    bool moves = false;
    uint32 origins = 0;
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float largest = lane_maximum_above_0<Traits>(logits, m, half);
        moves |= !(fmaf(largest, scale, -offset[m][half]) <= kHeadroom);
        origins = max(origins, __float_as_uint(offset[m][half]));
      }
    }
    if (__any_sync(0xffffffffu, origins > __float_as_uint(kFarLogit))) {
      // Of a row without an origin, as all are in the first step, the answer is known.
      if (__any_sync(0xffffffffu, origins >= __float_as_uint(-kInfinity))) {
        moves = true;
      } else {
        moves = outgrow_origins<Traits>(offset, logits, scale);
      }
    }
    // Why opaque: searched for behind the mask, the logits before it would hold registers.
    return opaque(int(moves)) != 0;
  }
  return outgrow_origins<Traits>(offset, logits, scale);
}

// Moves the origins of rows to their largest logit so far, and the sums with them. Where no key was
// seen yet, 0 stands in for -inf, so that no difference of infinities arises. Where logit * scale
// is so large that its rounding would show, origins are subtracted from the logits here, exactly,
// at each step.
template <typename Traits>
__device__ __forceinline__ void move_origins(RowState<Traits>& state, Logits<Traits>& logits,
                                             float (&offset)[Traits::kMFrags][2], float scale) {
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
    float origin[2];
    float rescale[2];
    bool far = false;
    bool has_sums = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      has_sums |= state.maximum[m][half] != -kInfinity;
      float maximum = fmaxf(state.maximum[m][half], lane_maximum<Traits>(logits, m, half));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      origin[half] = maximum == -kInfinity ? 0.0f : maximum;
      rescale[half] = exp2_fast((state.maximum[m][half] - origin[half]) * scale);
      state.maximum[m][half] = maximum;
      state.sum[m][half] *= rescale[half];
      offset[m][half] = origin[half] * scale;
      far |= fabsf(offset[m][half]) > kFarLogit;
    }
    // In the first step there are none.
    if (!Traits::kCountsArrivals || __any_sync(0xffffffffu, has_sums)) {
#pragma unroll
      for (int n = 0; n < Traits::kVoFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.out[m][n][i] *= rescale[i / 2];
      }
    }
    if (__any_sync(0xffffffffu, far)) {
#pragma unroll
      for (int n = 0; n < Traits::kKeyFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[m][n][i] -= origin[i / 2];
      }
      offset[m][0] = offset[m][1] = 0.0f;
    }
  }
}

// A step's exponentials as operand A of the products with values: the accumulators of two
// neighbouring logit fragments have its very layout. An exponent is logit * scale - offset in one
// multiply-add.
template <typename Traits>
struct Exponentials {
  static constexpr int kGroups = Traits::kOwnKeys / 16;  // of 16 keys: what a product takes
  static constexpr int kPairs = Traits::kMFrags * 4;     // of exponentials in a group
  uint32 operands[kGroups][Traits::kMFrags][4];
  float sum[Traits::kMFrags][2];

  __device__ __forceinline__ Exponentials() {
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) sum[m][0] = sum[m][1] = 0.0f;
  }

  __device__ __forceinline__ void take(int group, int pair, const Logits<Traits>& logits,
                                       const float (&offset)[Traits::kMFrags][2], float scale) {
    const int m = pair / 4;
    const int n = fragment(group, pair);
    const int half = pair % 2;
    const float first = exp2_fast(fmaf(logits[m][n][2 * half], scale, -offset[m][half]));
    const float second = exp2_fast(fmaf(logits[m][n][2 * half + 1], scale, -offset[m][half]));
    add(group, pair, first, second);
  }

  // The fragment of logits that a pair is from.
  static __device__ __forceinline__ int fragment(int group, int pair) {
    return group * 2 + pair % 4 / 2;
  }

  __device__ __forceinline__ void add(int group, int pair, float first, float second) {
    const int m = pair / 4;
    const int half = pair % 2;
    const bool begins = Traits::kStoresMatrices && group == 0 && pair % 4 < 2;
    sum[m][half] = begins ? first + second : sum[m][half] + (first + second);
    operands[group][m][pair % 4] = pack_pair<typename Traits::T>(first, second);
  }
};

// The products with values. Exponentials from the kTaken-th group on are taken here by take(group,
// pair), among the products with the kTaken-th group before. beside(i) runs after the products with
// the i-th fragments that are read.
template <typename Traits, int kTaken = Traits::kEarlyGroups, typename Take, typename Beside>
__device__ __forceinline__ void multiply_values(RowState<Traits>& state,
                                                const Exponentials<Traits>& exponentials, Take take,
                                                uint32 value_tile, uint32 value_lane_offset,
                                                Beside beside) {
  using T = typename Traits::T;
  constexpr int kPairs = Exponentials<Traits>::kPairs;
  constexpr int kReads = Traits::kVoFrags / 2;
#pragma unroll
  for (int k = 0; k < Exponentials<Traits>::kGroups; ++k) {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      const int n = 2 * read;
      uint32 b[4];
      value_operand<T, typename Traits::Element, Traits::kValueRowBytes>(
          b, value_tile, value_lane_offset, k * 16, n);
#pragma unroll
      for (int m = 0; m < Traits::kMFrags; ++m) {
        mma_m16n8k16<T>(state.out[m][n], exponentials.operands[k][m], b[0], b[1]);
        mma_m16n8k16<T>(state.out[m][n + 1], exponentials.operands[k][m], b[2], b[3]);
      }
      beside(k * kReads + read);
      const int next = k + kTaken;
      if (next < Exponentials<Traits>::kGroups) {
#pragma unroll
        for (int pair = kPairs * read / kReads; pair < kPairs * (read + 1) / kReads; ++pair) {
          take(next, pair);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) state.sum[m][half] += exponentials.sum[m][half];
  }
}

}  // namespace ridgeline
