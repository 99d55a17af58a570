// Adds up the parts of rows whose keys were cut, from the first keys to the last:
//   out = sum_p 2^((max_p - max) scale) sums_p / sum_p 2^((max_p - max) scale) sum_p
// A warp takes 128 columns of a row, four a lane. Parts are added up in groups of kPartsAtOnce,
// whose loads are on their way together, then the groups. The bits of a result follow from the
// parts alone: any warp of any kernel gets the same ones. All SMs; any head_dim_vo that is a
// multiple of 8.
#pragma once

#include "attention/row_target.cuh"
#include "common/fence.cuh"
#include "common/pack.cuh"

namespace ridgeline {

static_assert(kPartsAtOnce <= 32, "a lane has the statistics of one of them");

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

// The parts from `begin` on, kPartsAtOnce of them or what is left. Why past the first cache: other
// SMs wrote them during this launch.
__device__ __forceinline__ RowSums add_group(const AttentionParams& params, const CutRow& row,
                                             int begin, int column, float scale) {
  const int lane = threadIdx.x % 32;
  const int count = min(row.num_parts - begin, kPartsAtOnce);
  const int64 place = row.first + int64(begin) * row.stride;
  const int64 step = int64(row.stride) * params.head_dim_vo;
  const bool has_column = column < params.head_dim_vo;
  float2 stats = make_float2(-kInfinity, 0.0f);
  if (lane < count) {
    stats = __ldcg(reinterpret_cast<const float2*>(params.partial_stats) + place +
                   int64(lane) * row.stride);
  }
  const float* part = params.partial_out + place * params.head_dim_vo + column;
  float4 values[kPartsAtOnce];
#pragma unroll
  for (int i = 0; i < kPartsAtOnce; ++i) {
    values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (has_column && i < count) values[i] = __ldcg(reinterpret_cast<const float4*>(part));
    part += step;
  }
  float maximum = stats.x;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
  }
  // A part without visible keys has sum 0.
  const float weight = stats.y == 0.0f ? 0.0f : exp2_fast((stats.x - origin_of(maximum)) * scale);
  RowSums sums = no_sums();
  sums.maximum = maximum;
  sums.sum = __fmul_rn(weight, stats.y);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.sum += __shfl_xor_sync(0xffffffffu, sums.sum, distance);
  }
#pragma unroll
  for (int i = 0; i < kPartsAtOnce; ++i) {
    add_weighted(sums.values, values[i], __shfl_sync(0xffffffffu, weight, i));
  }
  return sums;
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

// All parts of a row, by one warp.
__device__ __forceinline__ RowSums add_parts(const AttentionParams& params, const CutRow& row,
                                             int column, float scale) {
  RowSums sums = no_sums();
#pragma unroll 1
  for (int begin = 0; begin < row.num_parts; begin += kPartsAtOnce) {
    append(sums, add_group(params, row, begin, column, scale), scale);
  }
  return sums;
}

// The same by kWarps warps of a CTA, all of which call it; warp 0 has the result.
template <int kWarps>
__device__ __forceinline__ RowSums add_parts_together(const AttentionParams& params,
                                                      const CutRow& row, int column, float scale,
                                                      RowSums (&of_warps)[kWarps][32]) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  RowSums sums = no_sums();
#pragma unroll 1
  for (int begin = 0; begin < row.num_parts; begin += kWarps * kPartsAtOnce) {
    const int own = begin + warp * kPartsAtOnce;
    __syncthreads();
    if (own < row.num_parts) of_warps[warp][lane] = add_group(params, row, own, column, scale);
    __syncthreads();
    if (warp > 0) continue;
    for (int other = 0; other < kWarps && begin + other * kPartsAtOnce < row.num_parts; ++other) {
      append(sums, of_warps[other][lane], scale);
    }
  }
  return sums;
}

// The first of this lane's columns in a warp's `block` of columns.
__device__ __forceinline__ int lane_column(int block) {
  return block * kColumnsOfWarp + threadIdx.x % 32 * 4;
}

__device__ __forceinline__ int num_column_blocks(const AttentionParams& params) {
  return (params.head_dim_vo + kColumnsOfWarp - 1) / kColumnsOfWarp;
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

// The parts of a tile: its first row's, with the next row's a row further each.
struct CutParts {
  CutRow row;
  int num_rows;

  __device__ __forceinline__ CutRow of_row(int i) const {
    return {row.first + i, row.stride, row.num_parts};
  }
  __device__ __forceinline__ bool in_groups() const { return row.num_parts > kMaxPartsOfCta; }
  __device__ __forceinline__ int num_groups() const {
    return (row.num_parts + kPartsAtOnce - 1) / kPartsAtOnce;
  }
};

// Puts the sums of a tile's `group`, by all warps of a CTA, in the place of the group's first part.
template <int kWarps>
__device__ __forceinline__ void merge_group(const AttentionParams& params, const CutParts& parts,
                                            int group, float scale) {
  const int begin = group * kPartsAtOnce;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < parts.num_rows; i += kWarps) {
    const CutRow row = parts.of_row(i);
    const int64 place = row.first + int64(begin) * row.stride;
    float2 stats;
#pragma unroll 1
    for (int block = 0; block < num_column_blocks(params); ++block) {
      const int column = lane_column(block);
      const RowSums sums = add_group(params, row, begin, column, scale);
      stats = make_float2(sums.maximum, sums.sum);
      if (column < params.head_dim_vo) {
        *reinterpret_cast<float4*>(params.partial_out + place * params.head_dim_vo + column) =
            sums.values;
      }
    }
    if (threadIdx.x % 32 == 0) reinterpret_cast<float2*>(params.partial_stats)[place] = stats;
  }
}

// The groups of a row, which merge_group() left.
__device__ __forceinline__ RowSums add_groups(const AttentionParams& params, const CutRow& row,
                                              int column, float scale) {
  constexpr int kAtOnce = 8;
  const int64 stride = int64(row.stride) * kPartsAtOnce;
  RowSums sums = no_sums();
#pragma unroll 1
  for (int begin = 0; begin * kPartsAtOnce < row.num_parts; begin += kAtOnce) {
    RowSums groups[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      groups[i] = no_sums();
      if ((begin + i) * kPartsAtOnce >= row.num_parts) continue;
      const int64 place = row.first + (begin + i) * stride;
      const float2 stats = __ldcg(reinterpret_cast<const float2*>(params.partial_stats) + place);
      groups[i].maximum = stats.x;
      groups[i].sum = stats.y;
      if (column >= params.head_dim_vo) continue;
      groups[i].values = __ldcg(reinterpret_cast<const float4*>(
          params.partial_out + place * params.head_dim_vo + column));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if ((begin + i) * kPartsAtOnce < row.num_parts) append(sums, groups[i], scale);
    }
  }
  return sums;
}

// The rows of a tile, by all warps of a CTA. Row i goes to row_goes(i), or nowhere if its token is
// negative.
template <typename T, int kWarps, typename RowGoes>
__device__ __forceinline__ void merge_tile(const AttentionParams& params, const CutParts& parts,
                                           float scale, RowGoes row_goes) {
  const int blocks = num_column_blocks(params);
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < parts.num_rows * blocks; i += kWarps) {
    const int row = blocks == 1 ? i : i / blocks;
    const int column = lane_column(i - row * blocks);
    const RowTarget target = row_goes(row);
    if (target.token < 0) continue;
    const CutRow of_row = parts.of_row(row);
    const RowSums sums = parts.in_groups() ? add_groups(params, of_row, column, scale)
                                           : add_parts(params, of_row, column, scale);
    store_sums<T>(params, target, column, sums, scale);
  }
}

// Whether this CTA counted the last of `expected`, by its thread 0. All threads call it, and each
// may read afterwards what other CTAs wrote before they counted.
__device__ __forceinline__ bool counts_last(int* counter, int expected) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_gpu();
    is_last = atomicAdd(counter, 1) + 1 == expected;
    fence_gpu();
  }
  __syncthreads();
  return is_last;
}

}  // namespace ridgeline
