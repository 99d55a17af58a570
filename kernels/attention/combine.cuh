// Adds up the parts that attention() left of each row when the keys were split, in a fixed order:
//   out = sum_s 2^((max_s - max) scale) sums_s / sum_s 2^((max_s - max) scale) sum_s
// A CTA takes one row of one query head. Its threads form groups of head_dim_vo / 4 (four columns a
// thread); group g adds up the parts g, g + num_groups, ..., then the groups are added up in order.
// All SMs; any head_dim_vo that is a multiple of 8 up to 256.
#pragma once

#include "attention/params.h"
#include "common/fast_math.cuh"
#include "common/pack.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

// A part as (maximum, sum), or several of them as one.
__device__ __forceinline__ float2 merge_stats(float2 a, float2 b, float scale) {
  const float maximum = fmaxf(a.x, b.x);
  const float origin = maximum == -kInfinity ? 0.0f : maximum;
  return make_float2(
      maximum, exp2_fast((a.x - origin) * scale) * a.y + exp2_fast((b.x - origin) * scale) * b.y);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine(const __grid_constant__ CombineParams params) {
  __shared__ float4 group_sums[kCombineThreads];
  const int query = blockIdx.x / params.num_qo_heads;
  const int head = blockIdx.x % params.num_qo_heads;
  const int group_size = params.num_qo_heads / params.num_kv_heads;
  const int packed = query * group_size + head % group_size;
  const int q_tile = packed / params.tile_q;
  const int first_slot = (q_tile * params.num_kv_heads + head / group_size) * params.num_splits;
  const int64 first_row = int64(first_slot) * params.tile_q + packed % params.tile_q;
  const float2* stats = reinterpret_cast<const float2*>(params.partial_stats);
  const int columns = params.head_dim_vo / 4;
  const int num_groups = kCombineThreads / columns;
  const int group = threadIdx.x / columns;
  const int column = threadIdx.x % columns;
  const float scale = params.exponent_scale;
  pdl_wait();

  // Every warp finds the row's maximum and sum for itself: a lane merges every 32nd part.
  float2 total = make_float2(-kInfinity, 0.0f);
  for (int split = threadIdx.x % 32; split < params.num_splits; split += 32) {
    total = merge_stats(total, stats[first_row + int64(split) * params.tile_q], scale);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float2 other = make_float2(__shfl_xor_sync(0xffffffffu, total.x, distance),
                                     __shfl_xor_sync(0xffffffffu, total.y, distance));
    total = merge_stats(total, other, scale);
  }
  const float origin = total.x == -kInfinity ? 0.0f : total.x;

  // A part without visible keys has sum 0; its row holds nothing yet.
  float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (group < num_groups) {
#pragma unroll 4
    for (int split = group; split < params.num_splits; split += num_groups) {
      const int64 row = first_row + int64(split) * params.tile_q;
      const float2 part = stats[row];
      const float4* rows = reinterpret_cast<const float4*>(params.partial_out);
      const float4 sums = rows[row * columns + column];
      const float weight = exp2_fast((part.x - origin) * scale);
      const bool empty = part.y == 0.0f;
      values.x += empty ? 0.0f : weight * sums.x;
      values.y += empty ? 0.0f : weight * sums.y;
      values.z += empty ? 0.0f : weight * sums.z;
      values.w += empty ? 0.0f : weight * sums.w;
    }
  }
  group_sums[threadIdx.x] = values;
  __syncthreads();
  if (group > 0) return;

  for (int other = 1; other < num_groups; ++other) {
    const float4 sums = group_sums[other * columns + column];
    values.x += sums.x;
    values.y += sums.y;
    values.z += sums.z;
    values.w += sums.w;
  }
  const float factor = total.y == 0.0f ? 0.0f : 1.0f / total.y;
  T* out =
      static_cast<T*>(params.out) + query * params.out_stride_token + head * params.out_stride_head;
  reinterpret_cast<uint2*>(out)[column] =
      make_uint2(pack_pair<T>(values.x * factor, values.y * factor),
                 pack_pair<T>(values.z * factor, values.w * factor));
  if (column == 0 && params.lse != nullptr) {
    params.lse[int64(query) * params.num_qo_heads + head] =
        total.y == 0.0f ? -kInfinity : total.x * (scale * kLn2) + logf(total.y);
  }
}

}  // namespace ridgeline
