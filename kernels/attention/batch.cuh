// Attention for a batch of requests of any lengths, sm_75 and up: as in portable.cuh, with queries
// and keys of each request where the work list says. A CTA runs the records from its first to the
// next CTA's first, each a query tile of one KV head against a range of keys; tiles of two heights
// may meet in one launch. Parts of cut tiles are added up by batch_combine.cuh.
//
// The list is the caller's: every field is held to its range, and a list of another configuration
// (its tag differs) runs nothing.
#pragma once

#include "attention/addressing.cuh"
#include "attention/batch_params.h"
#include "attention/tile.cuh"
#include "attention/variants.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

__device__ __forceinline__ int held_to(int value, int low, int high) {
  return max(low, min(value, high));
}

// A record of the list as an item whose fields are in their ranges.
__device__ __forceinline__ BatchItem checked_item(const BatchAttentionParams& params, int index,
                                                  int& height_idx) {
  const int4* words = reinterpret_cast<const int4*>(params.list + params.records_at) + index * 3ll;
  const int4 a = words[0], b = words[1], c = words[2];
  height_idx = a.x & 1;
  BatchItem item = {};
  item.index = index;
  item.work.request = a.y;
  item.work.kv_head = held_to(a.z, 0, int(params.attention.num_kv_heads.divisor) - 1);
  item.work.q_begin = held_to(b.x, 0, params.num_tokens - 1);
  item.request.qo_len = held_to(b.y, 1, params.num_tokens - item.work.q_begin);
  const int num_rows = item.request.qo_len * int(params.attention.group_size.divisor);
  item.work.q_row_begin = held_to(a.w, 0, num_rows - 1);
  int64 most_keys = 0;
  if (params.form == KvForm::kPadded) {
    item.kv_origin = held_to(b.z, 0, params.num_indices - 1);
    most_keys = params.max_kv_len;
  } else {
    item.kv_origin = held_to(b.z, 0, params.num_indices);
    most_keys = int64(params.num_indices - item.kv_origin);
    if (is_paged(params.form)) most_keys *= params.page_size.divisor;
  }
  item.request.kv_len = b.w < 0 ? 0 : b.w < most_keys ? b.w : int(most_keys);
  item.work.kv_end = held_to(c.y, 0, item.request.kv_len);
  item.work.kv_begin = held_to(c.x, 0, item.work.kv_end);
  item.work.partial_row = c.z < 0 ? -1 : min(c.z, params.last_partial_row);
  return item;
}

// The first record of a CTA.
__device__ __forceinline__ int first_record(const BatchAttentionParams& params, int cta) {
  return held_to(params.list[kFirstRecordsAt + cta], 0, params.max_records);
}

template <typename Traits>
__device__ __forceinline__ void run_item(const BatchAttentionParams& params, BatchItem& item,
                                         unsigned char* smem) {
  const auto get_work = [&](int) -> const WorkItem& { return item.work; };
  const auto make_kv = [&](const WorkItem&) { return typename Traits::Kv(params, item); };
  const auto keep = [&](KeyRange keys) -> const KeyRange& {
    if (threadIdx.x == 0) item.seen_by_all = keys;
    __syncthreads();
    return item.seen_by_all;
  };
  attend_tile<Traits>(params.attention, item.request, 0, get_work, make_kv, keep, smem);
}

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
struct BatchKernel;

template <typename T, typename Dims, int kHeight, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<kHeight>, Kv, Variant> {
  static constexpr int kLow = kHeight;
  static constexpr int kHigh = kHeight;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params, BatchItem& item,
                                             int /*height_idx*/, unsigned char* smem) {
    run_item<TileTraits<T, Dims, kHeight, Kv, Variant>>(params, item, smem);
  }
};

template <typename T, typename Dims, int low, int high, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<low, high>, Kv, Variant> {
  static constexpr int kLow = low;
  static constexpr int kHigh = high;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params, BatchItem& item,
                                             int height_idx, unsigned char* smem) {
    if (height_idx == 0) {
      run_item<TileTraits<T, Dims, low, Kv, Variant>>(params, item, smem);
    } else {
      run_item<TileTraits<T, Dims, high, Kv, Variant>>(params, item, smem);
    }
  }
};

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
__global__ void __launch_bounds__(
    batch_block_size(Dims::kQk, Dims::kVo, BatchKernel<T, Dims, Heights, Kv, Variant>::kLow,
                     BatchKernel<T, Dims, Heights, Kv, Variant>::kHigh, kSm),
    batch_ctas_per_sm(Dims::kQk, Dims::kVo, BatchKernel<T, Dims, Heights, Kv, Variant>::kLow,
                      BatchKernel<T, Dims, Heights, Kv, Variant>::kHigh, kSm))
    batch_attention(const __grid_constant__ BatchAttentionParams params) {
  using Kernel = BatchKernel<T, Dims, Heights, Kv, Variant>;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ BatchItem item;
  __shared__ int height_idx;
  pdl_wait();
  if (params.list[0] != params.tag) return;
  for (int index = first_record(params, blockIdx.x); index < first_record(params, blockIdx.x + 1);
       index = item.index + 1) {
    __syncthreads();
    if (threadIdx.x == 0) item = checked_item(params, index, height_idx);
    __syncthreads();
    Kernel::run(params, item, height_idx, smem + opaque(0));
  }
}

}  // namespace ridgeline
