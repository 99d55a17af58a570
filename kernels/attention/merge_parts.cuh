// Adds up the parts of rows whose keys were cut, from the first keys to the last:
//   out = sum_p 2^((max_p - max) scale) sums_p / sum_p 2^((max_p - max) scale) sum_p
// A warp takes 128 columns of a row, four a lane. Parts are added up in groups of kPartsAtOnce,
// then the groups. The bits of a result follow from the parts alone: any warp of any kernel gets
// the same ones. All SMs; any head_dim_vo that is a multiple of 8.
#pragma once

#include "attention/row_target.cuh"
#include "common/arch.cuh"
#include "common/cp_async.cuh"
#include "common/fence.cuh"
#include "common/ldmatrix.cuh"
#include "common/pack.cuh"

namespace ridgeline {

static_assert(kPartsAtOnce <= 32, "a lane has the statistics of one of them");

inline constexpr int kColumnsOfWarp = 128;
inline constexpr int kStagedParts = 2 * kPartsAtOnce;

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

// The weights of up to kPartsAtOnce parts, a lane each, with the largest logit and the sum of all.
__device__ __forceinline__ float weigh(RowSums& sums, float2 stats, float scale) {
  sums.maximum = stats.x;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.maximum = fmaxf(sums.maximum, __shfl_xor_sync(0xffffffffu, sums.maximum, distance));
  }
  // A part without visible keys has sum 0.
  const float weight =
      stats.y == 0.0f ? 0.0f : exp2_fast((stats.x - origin_of(sums.maximum)) * scale);
  sums.sum = __fmul_rn(weight, stats.y);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.sum += __shfl_xor_sync(0xffffffffu, sums.sum, distance);
  }
  return weight;
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

// What a lane reads of a row: statistics and its columns of the parts, past the first cache, since
// other SMs wrote them during this launch.
struct LaneParts {
  const float2* stats;  // of the first part
  const float* sums;
  int stride;  // rows from a part to the next
  int num_columns;
  bool has_columns;

  __device__ __forceinline__ LaneParts(const AttentionParams& params, const CutRow& row, int column)
      : stats(reinterpret_cast<const float2*>(params.partial_stats) + row.first),
        sums(params.partial_out + row.first * params.head_dim_vo + column),
        stride(row.stride),
        num_columns(params.head_dim_vo),
        has_columns(column < params.head_dim_vo) {}

  // Of part begin + lane, if there are so many.
  __device__ __forceinline__ float2 stats_of(int begin, int num_parts) const {
    const int part = begin + threadIdx.x % 32;
    if (threadIdx.x % 32 >= kPartsAtOnce || part >= num_parts) return {-kInfinity, 0.0f};
    return __ldcg(stats + int64(part) * stride);
  }
  __device__ __forceinline__ const float4* sums_of(int part) const {
    return reinterpret_cast<const float4*>(sums + int64(part) * stride * num_columns);
  }
};

// Where a warp has parts on their way. In registers: few of them.
struct InRegisters {
  __device__ __forceinline__ RowSums add(const LaneParts& parts, int num_parts, float scale) const {
    constexpr int kOnTheirWay = 4;
    RowSums sums = no_sums();
#pragma unroll 1
    for (int begin = 0; begin < num_parts; begin += kPartsAtOnce) {
      const float2 stats = parts.stats_of(begin, num_parts);
      const int count = min(kPartsAtOnce, num_parts - begin);
      RowSums group = no_sums();
      float weight = 0.0f;
#pragma unroll 1
      for (int first = 0; first < count; first += kOnTheirWay) {
        float4 values[kOnTheirWay];
#pragma unroll
        for (int i = 0; i < kOnTheirWay; ++i) {
          values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (parts.has_columns && first + i < count) {
            values[i] = __ldcg(parts.sums_of(begin + first + i));
          }
        }
        if (first == 0) weight = weigh(group, stats, scale);
#pragma unroll
        for (int i = 0; i < kOnTheirWay; ++i) {
          add_weighted(group.values, values[i], __shfl_sync(0xffffffffu, weight, first + i));
        }
      }
      append(sums, group, scale);
    }
    return sums;
  }
};

// In shared memory: two groups of them. A lane reads what it copied itself.
struct Staged {
  const unsigned char* lane;  // this lane's 16 bytes of a part
  int part_bytes;

  __device__ __forceinline__ RowSums add(const LaneParts& parts, int num_parts, float scale) const {
    RowSums sums = no_sums();
#pragma unroll 1
    for (int begin = 0; begin < num_parts; begin += kStagedParts) {
      const int count = min(kStagedParts, num_parts - begin);
      if (parts.has_columns) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          cp_async_16(shared_address(lane) + i * part_bytes, parts.sums_of(begin + i), true);
        }
      }
      cp_async_commit();
      const float2 stats = parts.stats_of(begin, num_parts);
      const float2 more_stats = parts.stats_of(begin + kPartsAtOnce, num_parts);
      cp_async_wait<0>();
#pragma unroll 1
      for (int first = 0; first < count; first += kPartsAtOnce) {
        RowSums group = no_sums();
        const float weight = weigh(group, first == 0 ? stats : more_stats, scale);
#pragma unroll 2
        for (int i = first; i < min(count, first + kPartsAtOnce); ++i) {
          const float factor = __shfl_sync(0xffffffffu, weight, i - first);
          if (!parts.has_columns) continue;
          const float4 values = *reinterpret_cast<const float4*>(lane + i * part_bytes);
          add_weighted(group.values, values, factor);
        }
        append(sums, group, scale);
      }
    }
    return sums;
  }
};

// In the memory of a kernel's tiles, which are done. On sm_75 a copy does not run in the
// background.
template <int kVo>
__device__ __forceinline__ auto merge_stage(const unsigned char* smem) {
  if constexpr (kSm >= 80) {
    constexpr int kPartBytes = (kVo < kColumnsOfWarp ? kVo : kColumnsOfWarp) * int(sizeof(float));
    const int warp = threadIdx.x / 32;
    return Staged{smem + warp * kStagedParts * kPartBytes + threadIdx.x % 32 * 16, kPartBytes};
  } else {
    return InRegisters{};
  }
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
  store_columns<T>(params, target, column, sums.values,
                   sums.sum == 0.0f ? 0.0f : reciprocal(sums.sum));
  if (column == 0) target.write_lse(params, scale, sums.maximum, sums.sum);
}

// The parts of a tile: those of its first row, with the next row's a row further each.
struct CutParts {
  CutRow row;
  int num_rows;

  __device__ __forceinline__ CutRow of_row(int i) const {
    return {row.first + i, row.stride, row.num_parts};
  }
  // Very many parts are added up in groups first, whose sums take the places of their first parts.
  __device__ __forceinline__ bool in_groups() const { return row.num_parts > kMaxPartsOfWarp; }
  __device__ __forceinline__ int num_groups() const {
    return (row.num_parts + kPartsAtOnce - 1) / kPartsAtOnce;
  }
  __device__ __forceinline__ int group_size(int group) const {
    return min(kPartsAtOnce, row.num_parts - group * kPartsAtOnce);
  }
  __device__ __forceinline__ CutParts of_group(int group) const {
    return {{row.first + int64(group * kPartsAtOnce) * row.stride, row.stride, group_size(group)},
            num_rows};
  }
  __device__ __forceinline__ CutParts of_groups() const {
    return {{row.first, row.stride * kPartsAtOnce, num_groups()}, num_rows};
  }
};

// Adds up the parts of a row, by one warp: to `target`, or nowhere if its token is negative; of a
// group to where its first part is.
template <typename T, typename Stage>
__device__ __forceinline__ void merge_row(const AttentionParams& params, const CutRow& row,
                                          const RowTarget& target, bool is_group, float scale,
                                          const Stage& stage) {
  float2 stats = make_float2(0.0f, 0.0f);
#pragma unroll 1
  for (int column = lane_column(); column - lane_column() < params.head_dim_vo;
       column += kColumnsOfWarp) {
    const LaneParts parts(params, row, column);
    const RowSums sums = stage.add(parts, row.num_parts, scale);
    if (is_group) {
      stats = make_float2(sums.maximum, sums.sum);
      float* out = params.partial_out + row.first * params.head_dim_vo + column;
      if (parts.has_columns) *reinterpret_cast<float4*>(out) = sums.values;
    } else if (target.token >= 0) {
      store_sums<T>(params, target, column, sums, scale);
    }
  }
  // Why last: every block of columns reads it.
  if (is_group && threadIdx.x % 32 == 0) {
    reinterpret_cast<float2*>(params.partial_stats)[row.first] = stats;
  }
}

// The rows of a tile, by all warps of a CTA; row i goes to row_goes(i).
template <typename T, int kWarps, typename Stage, typename RowGoes>
__device__ __forceinline__ void merge_rows(const AttentionParams& params, const CutParts& parts,
                                           bool is_group, float scale, const Stage& stage,
                                           RowGoes row_goes) {
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < parts.num_rows; i += kWarps) {
    merge_row<T>(params, parts.of_row(i), row_goes(i), is_group, scale, stage);
  }
}

// A row of very many parts, by all warps of a combining CTA.
template <typename T>
__device__ __forceinline__ void combine_by_cta(const AttentionParams& params, const CutParts& parts,
                                               int row, const RowTarget& target, float scale) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int group = warp; group < parts.num_groups(); group += kCombineWarps) {
    merge_row<T>(params, parts.of_group(group).of_row(row), target, true, scale, InRegisters{});
  }
  __syncthreads();
  if (warp > 0) return;
  merge_row<T>(params, parts.of_groups().of_row(row), target, false, scale, InRegisters{});
}

// Whether this CTA counted the last of `expected`, by its thread 0. All threads call it, and each
// may read afterwards what other CTAs wrote before they counted.
__device__ __forceinline__ bool counts_last(int* counter, int expected) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_gpu();
    is_last = count_up(counter) + 1 == expected;
  }
  __syncthreads();
  return is_last;
}

}  // namespace ridgeline
