// Where a packed row's result goes.
#pragma once

#include "attention/work_item.cuh"
#include "common/fast_math.cuh"

namespace ridgeline {

struct RowTarget {
  int token;
  int head;

  template <typename T>
  __device__ __forceinline__ T* out(const AttentionParams& params) const {
    return static_cast<T*>(params.out) + token * params.out_stride_token +
           head * params.out_stride_head;
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

}  // namespace ridgeline
