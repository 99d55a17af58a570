// Where the keys and values of a token lie. An addressing type names the element type of the cache,
// is made once for a work item, and answers with the first element of a token's key or value.
#pragma once

#include "attention/params.h"
#include "attention/work_item.cuh"

namespace ridgeline {

// One stride from token to token: dense caches, NHD and HND alike.
template <typename T>
struct StridedKv {
  using Element = T;

  const T* keys;
  const T* values;
  int64 key_stride;
  int64 value_stride;

  __device__ __forceinline__ StridedKv(const AttentionParams& params, const WorkItem& work)
      : keys(static_cast<const T*>(params.k) + work.kv_head * params.k_stride_head),
        values(static_cast<const T*>(params.v) + work.kv_head * params.v_stride_head),
        key_stride(params.k_stride_token),
        value_stride(params.v_stride_token) {}

  __device__ __forceinline__ const T* key(int token) const { return keys + token * key_stride; }
  __device__ __forceinline__ const T* value(int token) const {
    return values + token * value_stride;
  }
};

}  // namespace ridgeline
