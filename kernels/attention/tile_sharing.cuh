// Two warps that share rows, so that each reads half of what it would alone. Of a step's keys each
// has the logits of a half, and tells the other their exponentials; of the columns of the output
// each has a half too. Both have the same origins.
//
// What a warp tells here stays until all warps are past the step's barrier between products with
// keys and with values, and is there behind a barrier of the two.
#pragma once

#include "attention/tile_math.cuh"
#include "attention/tile_output.cuh"

namespace ridgeline {

template <typename Traits>
struct Sharing {
  static constexpr int kWarps = Traits::kNumThreads / 32;
  static constexpr int kFrags = Traits::kOwnKeys / 16 * Traits::kMFrags;
  using OfRows = float[Traits::kMFrags][2];  // a value of each of a lane's rows

  uint4 exponentials[kWarps][kFrags][32];
  float4 origins[kWarps][8];  // of the rows lane / 4, and 8, 16, 24 further down
  float4 others[kWarps][8];   // largest logits in the first step; sums in the end
  int moved[kWarps];          // whether origins have moved in this step

  static __device__ __forceinline__ Sharing& of_tile() {
    __shared__ Sharing sharing;
    return sharing;
  }
  // Why opaque: kept from step to step these would hold registers.
  static __device__ __forceinline__ int warp() { return opaque(int(threadIdx.x)) / 32; }
  static __device__ __forceinline__ int lane() { return opaque(int(threadIdx.x)) % 32; }

  static __device__ __forceinline__ void wait_for_other() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + warp() / 2) : "memory");
  }

  static __device__ __forceinline__ void tell(float4 (&to)[kWarps][8], const OfRows& values) {
    static_assert(Traits::kMFrags == 2, "four rows a lane");
    if (lane() % 4 == 0) {
      to[warp()][lane() / 4] = make_float4(values[0][0], values[0][1], values[1][0], values[1][1]);
    }
  }
  static __device__ __forceinline__ void hear(OfRows& values, const float4 (&from)[kWarps][8],
                                              int warp) {
    const float4 four = from[warp][lane() / 4];
    values[0][0] = four.x;
    values[0][1] = four.y;
    values[1][0] = four.z;
    values[1][1] = four.w;
  }

  // A step's exponentials, and the origins that they are relative to.
  __device__ __forceinline__ void tell(const Exponentials<Traits>& own,
                                       const RowState<Traits>& state, bool has_moved) {
#pragma unroll
    for (int i = 0; i < kFrags; ++i) {
      const uint32(&four)[4] = own.operands[i / Traits::kMFrags][i % Traits::kMFrags];
      exponentials[warp()][i][lane()] = make_uint4(four[0], four[1], four[2], four[3]);
    }
    tell(origins, state.maximum);
    if (lane() == 0) moved[warp()] = has_moved;
  }
  // The other's, relative to the larger of both warps' origins, which the own sums become too.
  __device__ __forceinline__ void hear(Exponentials<Traits>& other, RowState<Traits>& state,
                                       bool has_moved, float scale) const {
#pragma unroll
    for (int i = 0; i < kFrags; ++i) {
      const uint4 four = exponentials[warp() ^ 1][i][lane()];
      uint32(&to)[4] = other.operands[i / Traits::kMFrags][i % Traits::kMFrags];
      to[0] = four.x;
      to[1] = four.y;
      to[2] = four.z;
      to[3] = four.w;
    }
    if (has_moved || moved[warp() ^ 1] != 0) meet(other, state, scale);
  }

  // In the first step, the other's largest logits become the origins: those that are found next are
  // the largest of both.
  __device__ __forceinline__ void hear_maxima(RowState<Traits>& state,
                                              const Logits<Traits>& logits) {
    OfRows maxima;
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = lane_maximum<Traits>(logits, m, half);
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
        maxima[m][half] = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      }
    }
    tell(others, maxima);
    wait_for_other();
    hear(state.maximum, others, warp() ^ 1);
  }

  // From a lane's shares of its rows' sums over its warp's keys to shares of those over all keys.
  __device__ __forceinline__ void add_up(OfRows& sum) {
    OfRows own;
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) own[m][half] = quad_sum(sum[m][half]);
    }
    tell(others, own);
    wait_for_other();
    OfRows halves[2];
    hear(halves[0], others, warp() & ~1);
    hear(halves[1], others, warp() | 1);
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] = lane() % 4 == 0 ? halves[0][m][half] + halves[1][m][half] : 0.0f;
      }
    }
  }

 private:
  __device__ __forceinline__ void meet(Exponentials<Traits>& other, RowState<Traits>& state,
                                       float scale) const {
    using T = typename Traits::T;
    OfRows theirs;
    hear(theirs, origins, warp() ^ 1);
#pragma unroll
    for (int m = 0; m < Traits::kMFrags; ++m) {
      float rescale[2];
      float rescale_theirs[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float maximum = fmaxf(state.maximum[m][half], theirs[m][half]);
        const float origin = maximum == -kInfinity ? 0.0f : maximum;
        rescale[half] = exp2_fast((state.maximum[m][half] - origin) * scale);
        rescale_theirs[half] = exp2_fast((theirs[m][half] - origin) * scale);
        state.maximum[m][half] = maximum;
        state.sum[m][half] *= rescale[half];
      }
#pragma unroll
      for (int n = 0; n < Traits::kVoFrags; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state.out[m][n][i] *= rescale[i / 2];
      }
#pragma unroll
      for (int group = 0; group < other.kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32& operand = other.operands[group][m][i];
          const float2 pair = unpack_pair<T>(operand);
          operand = pack_pair<T>(pair.x * rescale_theirs[i % 2], pair.y * rescale_theirs[i % 2]);
        }
      }
    }
  }
};

}  // namespace ridgeline
