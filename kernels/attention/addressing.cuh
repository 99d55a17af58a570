// Where the keys and values of a token lie. An addressing type names the element type of the cache
// and is made once for a work item. look_up(first_token, end) reads what the addresses of a step
// depend on; turn_to() with the answer makes it the step that keys(first_token, end) and
// values(...) are asked for. These answer with an object whose at(lane_row, row, pass, element) is
// the address in token first_token + lane_row + row: lane_row is the calling thread's row in the
// first pass, row what the pass adds to it. Nothing is read of tokens from `end` on.
#pragma once

#include "attention/batch_params.h"
#include "attention/params.h"
#include "attention/work_item.cuh"
#include "common/opaque.cuh"

namespace ridgeline {

// Rows at one stride.
template <typename T>
struct StridedRows {
  const T* base;
  int64 stride;
  int first;

  // Why two sums: the first is the same in every pass, the second in every lane.
  __device__ __forceinline__ const T* at(int lane_row, int row, int /*pass*/, int element) const {
    const T* lane_base = base + (first + lane_row) * stride + uint32(element);
    return lane_base + row * stride;
  }
};

// One stride from token to token: dense caches, NHD and HND alike. Why opaque: no register of the
// loop for what a product makes.
template <typename T>
struct StridedKv {
  using Element = T;

  const AttentionParams& params;
  int kv_head;

  __device__ __forceinline__ StridedKv(const AttentionParams& params, const WorkItem& work)
      : params(params), kv_head(work.kv_head) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int /*first_token*/, int /*end*/) const {
    return 0;
  }
  __device__ __forceinline__ void turn_to(uint32 /*answer*/) {}

  template <int kLoaders>
  __device__ __forceinline__ StridedRows<T> keys(int first_token, int /*end*/) const {
    return {static_cast<const T*>(params.k) + opaque(kv_head) * params.k_stride_head,
            params.k_stride_token, first_token};
  }
  template <int kLoaders>
  __device__ __forceinline__ StridedRows<T> values(int first_token, int /*end*/) const {
    return {static_cast<const T*>(params.v) + opaque(kv_head) * params.v_stride_head,
            params.v_stride_token, first_token};
  }
};

// Requests of a batch one behind the other (ragged), or at one stride from each other (padded).
template <typename T>
struct RaggedKv {
  using Element = T;

  const BatchAttentionParams& params;
  const BatchItem& item;

  __device__ __forceinline__ RaggedKv(const BatchAttentionParams& params, const BatchItem& item)
      : params(params), item(item) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int /*first_token*/, int /*end*/) const {
    return 0;
  }
  __device__ __forceinline__ void turn_to(uint32 /*answer*/) {}

  template <int kLoaders>
  __device__ __forceinline__ StridedRows<T> keys(int first_token, int /*end*/) const {
    return {static_cast<const T*>(params.attention.k) + item.key_offset,
            params.attention.k_stride_token, first_token};
  }
  template <int kLoaders>
  __device__ __forceinline__ StridedRows<T> values(int first_token, int /*end*/) const {
    return {static_cast<const T*>(params.attention.v) + item.value_offset,
            params.attention.v_stride_token, first_token};
  }
};

// Rows whose places in the pool the lanes of a warp know. Eight lanes load a row of a pass
// together; the p-th of them knows the place of their row in pass p.
template <typename T>
struct PooledRows {
  const T* pool;
  uint32 place;  // units from the pool's begin to this lane's row
  uint32 unit;   // elements

  __device__ __forceinline__ const T* at(int /*lane_row*/, int /*row*/, int pass,
                                         int element) const {
    return pool + uint64(__shfl_sync(0xffffffffu, place, pass, 8)) * unit + uint32(element);
  }
};

// Pages of page_size tokens, in the order of a table. A warp loads four rows of a pass and at most
// 32 of a step: each lane looks up the page of one of them, and tells the others the place.
template <typename T>
struct PagedKv {
  using Element = T;

  const BatchAttentionParams& params;
  const BatchItem& item;
  uint32 page;  // of this lane's row

  __device__ __forceinline__ PagedKv(const BatchAttentionParams& params, const BatchItem& item)
      : params(params), item(item), page(0) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int first_token, int end) const {
    static_assert(kRows <= kLoaders, "a warp has a lane for each of its rows");
    const int row = lane_row<kLoaders>();
    if (row >= kRows) return 0;
    const int token = min(first_token + row, end - 1);
    return __ldg(params.kv_indices + item.kv_origin + params.page_size.quotient(token));
  }
  __device__ __forceinline__ void turn_to(uint32 answer) { page = answer; }

  template <int kLoaders>
  __device__ __forceinline__ PooledRows<T> keys(int first_token, int end) const {
    return {static_cast<const T*>(params.attention.k) + item.key_offset,
            place(min(first_token + lane_row<kLoaders>(), end - 1), params.k_page_units,
                  params.k_token_units),
            params.k_unit};
  }
  template <int kLoaders>
  __device__ __forceinline__ PooledRows<T> values(int first_token, int end) const {
    return {static_cast<const T*>(params.attention.v) + item.value_offset,
            place(min(first_token + lane_row<kLoaders>(), end - 1), params.v_page_units,
                  params.v_token_units),
            params.v_unit};
  }

 private:
  // This lane's row of a step, whose rows kLoaders threads load.
  template <int kLoaders>
  static __device__ __forceinline__ int lane_row() {
    const uint32 loader = uint32(opaque(int(threadIdx.x))) % kLoaders;
    return loader % 8 * (kLoaders / 8) + loader / 8;
  }

  // A page number beyond the pool means the last page.
  __device__ __forceinline__ uint32 place(int token, uint32 page_units, uint32 token_units) const {
    const uint32 entry = params.page_size.remainder(token);
    return min(page, uint32(params.num_pages - 1)) * page_units + entry * token_units;
  }
};

}  // namespace ridgeline
