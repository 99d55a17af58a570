// Where a packed row of a query tile lies in q and out.
#pragma once

#include "attention/work_item.cuh"
#include "common/fast_math.cuh"

namespace ridgeline {

struct RowTarget {
  int token;
  int head;

  __device__ __forceinline__ int64 out_offset(const AttentionParams& params) const {
    return token * params.out_stride_token + head * params.out_stride_head;
  }
  template <typename T>
  __device__ __forceinline__ T* out(const AttentionParams& params) const {
    return static_cast<T*>(params.out) + out_offset(params);
  }
  __device__ __forceinline__ void write_lse(const AttentionParams& params, float scale,
                                            float maximum, float sum) const {
    if (params.lse == nullptr) return;
    params.lse[int64(token) * params.num_qo_heads + head] =
        sum == 0.0f ? -kInfinity : maximum * (scale * kLn2) + logf(sum);
  }
};

// Of row `row` of a query tile of a KV head.
__device__ __forceinline__ RowTarget row_target(const AttentionParams& params, int kv_head,
                                                int q_begin, int q_row_begin, int row) {
  const int packed = q_row_begin + row;
  const int query = params.group_size.quotient(packed);
  const int group_size = params.group_size.divisor;
  return {q_begin + query, kv_head * group_size + packed - query * group_size};
}

__device__ __forceinline__ RowTarget row_target(const AttentionParams& params, const WorkItem& work,
                                                int row) {
  return row_target(params, work.kv_head, work.q_begin, work.q_row_begin, row);
}

}  // namespace ridgeline
