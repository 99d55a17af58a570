// Adds up the parts that attention() left of each row when the keys were split, in the order of the parts:
//   out = sum_s 2^(max_s - max) sums_s / sum_s 2^(max_s - max) sum_s
// A CTA takes one row of one query head. Its threads form groups of head_dim_vo / 4 (four columns a thread); group g adds up
// the parts g, g + num_groups, ..., then the groups are added up in order. All SMs; any head_dim_vo up to 256.
#pragma once

#include "attention/params.h"
#include "common/fast_math.cuh"
#include "common/pack.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

template <typename T>
__global__ void __launch_bounds__(kCombineThreads) combine(const __grid_constant__ CombineParams params) {
  __shared__ float4 group_sums[kCombineThreads];
  const int query = blockIdx.x / params.num_qo_heads;
  const int head = blockIdx.x % params.num_qo_heads;
  const int group_size = params.num_qo_heads / params.num_kv_heads;
  const int packed = query * group_size + head % group_size;
  const int first_slot =
      (packed / params.tile_q * params.num_kv_heads + head / group_size) * params.num_splits;
  const auto row_of = [&](int split) { return int64(first_slot + split) * params.tile_q + packed % params.tile_q; };
  const float2* stats = reinterpret_cast<const float2*>(params.partial_stats);
  const int columns = params.head_dim_vo / 4;
  const int num_groups = kCombineThreads / columns;
  const int group = threadIdx.x / columns;
  const int column = threadIdx.x % columns;
  pdl_wait();

  float maximum = -kInfinity;
  for (int split = 0; split < params.num_splits; ++split) maximum = fmaxf(maximum, stats[row_of(split)].x);
  const float origin = maximum == -kInfinity ? 0.0f : maximum;

  // A part without visible keys has sum 0 and did not write its row.
  float sum = 0.0f;
  for (int split = 0; split < params.num_splits; ++split) {
    const float2 part = stats[row_of(split)];
    sum += exp2_fast(part.x - origin) * part.y;
  }
  float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (group < num_groups) {
#pragma unroll 4
    for (int split = group; split < params.num_splits; split += num_groups) {
      const int64 row = row_of(split);
      const float2 part = stats[row];
      if (part.y == 0.0f) continue;
      const float weight = exp2_fast(part.x - origin);
      const float4 sums = reinterpret_cast<const float4*>(params.partial_out + row * params.head_dim_vo)[column];
      values.x += weight * sums.x;
      values.y += weight * sums.y;
      values.z += weight * sums.z;
      values.w += weight * sums.w;
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
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = static_cast<T*>(params.out) + query * params.out_stride_token + head * params.out_stride_head;
  reinterpret_cast<uint2*>(out)[column] = make_uint2(pack_pair<T>(values.x * factor, values.y * factor),
                                                     pack_pair<T>(values.z * factor, values.w * factor));
  if (column == 0 && params.lse != nullptr) {
    params.lse[int64(query) * params.num_qo_heads + head] =
        sum == 0.0f ? -kInfinity : maximum * kLn2 + logf(sum);
  }
}

}  // namespace ridgeline
