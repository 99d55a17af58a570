// Adds up the parts of rows whose keys were cut, from the first keys to the last:
//   out = sum_p 2^((max_p - max) scale) sums_p / sum_p 2^((max_p - max) scale) sum_p
// A warp takes 128 columns of a row, four a lane. Parts are added up in groups of kPartsOfGroup,
// then the groups. The bits of a result follow from the parts alone: any warp of any kernel gets
// the same ones. All SMs; any head_dim_vo that is a multiple of 8.
#pragma once

#include "attention/row_target.cuh"
#include "common/pack.cuh"

namespace ridgeline {

inline constexpr int kColumnsOfWarp = 128;

// The parts of one row.
struct CutRow {
  int64 first;  // row of the partial results that has the first part
  int stride;   // rows from a part to the next
  int num_parts;
};

// Some parts of a row: the largest logit, the sum of exponentials, and this lane's four columns of
// the weighted sums.
struct RowSums {
  float maximum;
  float sum;
  float4 values;
};

__device__ __forceinline__ RowSums no_sums() {
  return {-kInfinity, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
}

// Weights are relative to the largest logit; where there is none, to 0.
__device__ __forceinline__ float origin_of(float maximum) {
  return maximum == -kInfinity ? 0.0f : maximum;
}

__device__ __forceinline__ float4 weighted(float4 value, float weight) {
  return make_float4(__fmul_rn(value.x, weight), __fmul_rn(value.y, weight),
                     __fmul_rn(value.z, weight), __fmul_rn(value.w, weight));
}

__device__ __forceinline__ void add_weighted(float4& to, float4 value, float weight) {
  to.x = fmaf(weight, value.x, to.x);
  to.y = fmaf(weight, value.y, to.y);
  to.z = fmaf(weight, value.z, to.z);
  to.w = fmaf(weight, value.w, to.w);
}

__device__ __forceinline__ void append(RowSums& to, const RowSums& group, float scale) {
  const float maximum = fmaxf(to.maximum, group.maximum);
  const float origin = origin_of(maximum);
  const float kept = exp2_fast((to.maximum - origin) * scale);
  const float weight = exp2_fast((group.maximum - origin) * scale);
  to.maximum = maximum;
  to.sum = fmaf(weight, group.sum, __fmul_rn(to.sum, kept));
  to.values = weighted(to.values, kept);
  add_weighted(to.values, group.values, weight);
}

// The weights of a warp's parts, a lane each, with the largest logit and the sum of the lane's
// group.
template <int kParts = kPartsOfGroup>
__device__ __forceinline__ float weigh(float2 stats, float scale, float& maximum, float& sum) {
  maximum = stats.x;
#pragma unroll
  for (int distance = kParts / 2; distance > 0; distance /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
  }
  // A part without visible keys has sum 0.
  const float weight = stats.y == 0.0f ? 0.0f : exp2_fast((stats.x - origin_of(maximum)) * scale);
  sum = __fmul_rn(weight, stats.y);
#pragma unroll
  for (int distance = kParts / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return weight;
}

// Parts of a row on their way: of kGroups groups at most. Why past the first cache: other SMs wrote
// them during this launch.
template <int kGroups>
struct PartsAtOnce {
  static constexpr int kMost = kGroups * kPartsOfGroup;
  static_assert(kMost <= 32, "a lane has the statistics of one of them");
  int count;
  float2 stats;
  float4 values[kMost];

  __device__ __forceinline__ PartsAtOnce(const AttentionParams& params, const CutRow& row,
                                         int begin, int column)
      : count(min(row.num_parts - begin, kMost)), stats(make_float2(-kInfinity, 0.0f)) {
    const int lane = threadIdx.x % 32;
    const bool has_columns = column < params.head_dim_vo;
    const int64 step = int64(row.stride) * params.head_dim_vo;
    const int64 place = row.first + int64(begin) * row.stride;
    if (lane < count) {
      stats = __ldcg(reinterpret_cast<const float2*>(params.partial_stats) + place +
                     int64(lane) * row.stride);
    }
    const float* part = params.partial_out + place * params.head_dim_vo + column;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (has_columns && i < count) values[i] = __ldcg(reinterpret_cast<const float4*>(part));
      part += step;
    }
  }

  __device__ __forceinline__ void add_to(RowSums& sums, float scale) const {
    float maximum, sum;
    const float weight = weigh(stats, scale, maximum, sum);
#pragma unroll
    for (int first = 0; first < kMost; first += kPartsOfGroup) {
      if (first >= count) break;
      RowSums group = no_sums();
      group.maximum = __shfl_sync(0xffffffffu, maximum, first);
      group.sum = __shfl_sync(0xffffffffu, sum, first);
#pragma unroll
      for (int i = first; i < first + kPartsOfGroup; ++i) {
        add_weighted(group.values, values[i], __shfl_sync(0xffffffffu, weight, i));
      }
      append(sums, group, scale);
    }
  }
};

// All parts of a row, by one warp.
template <int kGroups>
__device__ __forceinline__ RowSums add_parts(const AttentionParams& params, const CutRow& row,
                                             int column, float scale) {
  RowSums sums = no_sums();
#pragma unroll 1
  for (int begin = 0; begin < row.num_parts; begin += PartsAtOnce<kGroups>::kMost) {
    PartsAtOnce<kGroups>(params, row, begin, column).add_to(sums, scale);
  }
  return sums;
}

// The same by all warps of a combining CTA, which have every kCombineWarps-th group each; warp 0
// has the result then.
__device__ __forceinline__ RowSums add_parts_together(const AttentionParams& params,
                                                      const CutRow& row, int column, float scale,
                                                      RowSums (&of_warps)[kCombineWarps][32]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  RowSums sums = no_sums();
#pragma unroll 1
  for (int begin = 0; begin < row.num_parts; begin += kCombineWarps * kPartsOfGroup) {
    RowSums own_sums = no_sums();
    PartsAtOnce<1>(params, row, begin + warp * kPartsOfGroup, column).add_to(own_sums, scale);
    __syncthreads();
    of_warps[warp][lane] = own_sums;
    __syncthreads();
    const int num_groups =
        min(kCombineWarps, (row.num_parts - begin + kPartsOfGroup - 1) / kPartsOfGroup);
    if (warp == 0) {
      for (int other = 0; other < num_groups; ++other) append(sums, of_warps[other][lane], scale);
    }
  }
  return sums;
}

// The first of this lane's first columns.
__device__ __forceinline__ int lane_column() {
  return threadIdx.x % 32 * 4;
}

// One warp's columns of a row.
template <typename T>
__device__ __forceinline__ void store_columns(const AttentionParams& params,
                                              const RowTarget& target, int column, float4 values,
                                              float factor) {
  if (column >= params.head_dim_vo) return;
  values = weighted(values, factor);
  *reinterpret_cast<uint2*>(target.out<T>(params) + column) =
      make_uint2(pack_pair<T>(values.x, values.y), pack_pair<T>(values.z, values.w));
}

template <typename T>
__device__ __forceinline__ void store_sums(const AttentionParams& params, const RowTarget& target,
                                           int column, const RowSums& sums, float scale) {
  store_columns<T>(params, target, column, sums.values, sums.sum == 0.0f ? 0.0f : 1.0f / sums.sum);
  if (column == 0) target.write_lse(params, scale, sums.maximum, sums.sum);
}

// The rows of a tile, by all warps of a CTA: of row `i` the parts row_parts(i), to row_goes(i), or
// nowhere if its token is negative.
template <typename T, int kWarps, int kGroups, typename RowParts, typename RowGoes>
__device__ __forceinline__ void merge_tile(const AttentionParams& params, int num_rows, float scale,
                                           RowParts row_parts, RowGoes row_goes) {
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < num_rows; i += kWarps) {
    const RowTarget target = row_goes(i);
    if (target.token < 0) continue;
#pragma unroll 1
    for (int first = 0; first < params.head_dim_vo; first += kColumnsOfWarp) {
      const int column = first + lane_column();
      store_sums<T>(params, target, column, add_parts<kGroups>(params, row_parts(i), column, scale),
                    scale);
    }
  }
}

// Groups of parts whose loads fit the registers of a kernel with tiles of 16 rows.
constexpr int groups_at_once(int head_dim_vo, int sm) {
  return head_dim_vo > 64 && sm >= 80 ? 4 : 2;
}

}  // namespace ridgeline
