// Adds up the parts of neighbouring rows of a cut tile, few of each: a warp does several rows at
// once, so that it waits for all of their parts together. The same sums in the same order as in
// merge_parts.cuh, so the same bits.
#pragma once

#include "attention/merge_parts.cuh"

namespace ridgeline {

// All parts of kRows rows on their way, kParts of each at most: lane i has the statistics of part
// i % kParts of row i / kParts, and four columns of all.
template <int kRows, int kParts>
struct RowsAtOnce {
  static_assert(kRows * kParts <= 32 && kParts <= kPartsOfGroup, "a lane for each part");
  float2 stats;
  float4 values[kRows][kParts];

  // Of the row whose parts are `first` and those after it.
  __device__ __forceinline__ RowsAtOnce(const AttentionParams& params, const CutRow& first,
                                        int num_rows, int column)
      : stats(make_float2(-kInfinity, 0.0f)) {
    const int lane = threadIdx.x % 32;
    if (lane / kParts < min(num_rows, kRows) && lane % kParts < first.num_parts) {
      stats = __ldcg(reinterpret_cast<const float2*>(params.partial_stats) + first.first +
                     lane / kParts + int64(lane % kParts) * first.stride);
    }
    const float* part = params.partial_out + first.first * params.head_dim_vo + column;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        values[row][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (column < params.head_dim_vo && i < first.num_parts && row < num_rows) {
          values[row][i] = __ldcg(reinterpret_cast<const float4*>(part + row * params.head_dim_vo));
        }
      }
      part += int64(first.stride) * params.head_dim_vo;
    }
  }

  // Gives each row's sums to take(row, sums).
  template <typename Take>
  __device__ __forceinline__ void add_up(float scale, Take take) const {
    float maximum, sum;
    const float weight = weigh<kParts>(stats, scale, maximum, sum);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      RowSums group = no_sums();
      group.maximum = __shfl_sync(0xffffffffu, maximum, row * kParts);
      group.sum = __shfl_sync(0xffffffffu, sum, row * kParts);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        add_weighted(group.values, values[row][i],
                     __shfl_sync(0xffffffffu, weight, row * kParts + i));
      }
      RowSums sums = no_sums();
      append(sums, group, scale);
      take(row, sums);
    }
  }
};

// Rows from the one whose parts are `first` on. Lane i knows where row i goes: nowhere if its token
// is negative.
template <typename T, int kRows, int kParts>
__device__ __forceinline__ void add_rows(const AttentionParams& params, const CutRow& first,
                                         int num_rows, float scale, const RowTarget& own) {
#pragma unroll 1
  for (int begin = 0; begin < params.head_dim_vo; begin += kColumnsOfWarp) {
    const int column = begin + lane_column();
    RowsAtOnce<kRows, kParts>(params, first, num_rows, column)
        .add_up(scale, [&](int row, const RowSums& sums) {
          const RowTarget target = {__shfl_sync(0xffffffffu, own.token, row),
                                    __shfl_sync(0xffffffffu, own.head, row)};
          if (row >= num_rows || target.token < 0) return;
          store_sums<T>(params, target, column, sums, scale);
        });
  }
}

}  // namespace ridgeline
