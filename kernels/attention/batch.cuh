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

// A record with every field in its range.
__device__ __forceinline__ WorkRecord checked_record(const BatchAttentionParams& params, int index,
                                                     int tile_q) {
  const int4* words = reinterpret_cast<const int4*>(params.list + params.records_at) + index * 3ll;
  const int4 a = words[0], b = words[1], c = words[2];
  WorkRecord record = {};
  record.segment_height = a.x & 1;
  record.request = a.y;
  record.kv_head = held_to(a.z, 0, int(params.attention.num_kv_heads.divisor) - 1);
  record.q_begin = held_to(b.x, 0, params.num_tokens - 1);
  record.qo_len = held_to(b.y, 1, params.num_tokens - record.q_begin);
  const int group_size = params.attention.group_size.divisor;
  record.q_row_begin = held_to(a.w, 0, record.qo_len * group_size - 1);
  int64 most_keys = 0;
  if (params.form == KvForm::kPadded) {
    record.kv_origin = held_to(b.z, 0, params.num_indices - 1);
    most_keys = params.max_kv_len;
  } else {
    record.kv_origin = held_to(b.z, 0, params.num_indices);
    most_keys = int64(params.num_indices - record.kv_origin);
    if (is_paged(params.form)) most_keys *= params.page_size.divisor;
  }
  record.kv_len = b.w < 0 ? 0 : b.w < most_keys ? b.w : int(most_keys);
  record.kv_end = held_to(c.y, 0, record.kv_len);
  record.kv_begin = held_to(c.x, 0, record.kv_end);
  const int last_partial_row = params.num_partial_rows - tile_q;
  record.index = index;
  record.partial_row = c.z < 0 || last_partial_row < 0 ? -1 : min(c.z, last_partial_row);
  return record;
}

// The first record of a CTA.
__device__ __forceinline__ int first_record(const BatchAttentionParams& params, int cta) {
  return held_to(params.list[kFirstRecordsAt + cta], 0, params.max_records);
}

template <typename Traits>
__device__ __forceinline__ void run_record(const BatchAttentionParams& params,
                                           const WorkRecord& record, const Request& request,
                                           unsigned char* smem) {
  const auto get_work = [&](int) {
    return WorkItem{0,
                    record.request,
                    record.kv_head,
                    record.q_row_begin,
                    record.kv_begin,
                    record.kv_end,
                    record.partial_row,
                    record.q_begin};
  };
  const auto make_kv = [&](const WorkItem&) { return typename Traits::Kv(params, record); };
  attend_tile<Traits>(params.attention, request, 0, get_work, make_kv, smem);
}

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
struct BatchKernel;

template <typename T, typename Dims, int kHeight, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<kHeight>, Kv, Variant> {
  static constexpr int kLow = kHeight;
  static constexpr int kHigh = kHeight;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params,
                                             const WorkRecord& record, const Request& request,
                                             unsigned char* smem) {
    run_record<TileTraits<T, Dims, kHeight, Kv, Variant>>(params, record, request, smem);
  }
};

template <typename T, typename Dims, int low, int high, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<low, high>, Kv, Variant> {
  static constexpr int kLow = low;
  static constexpr int kHigh = high;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params,
                                             const WorkRecord& record, const Request& request,
                                             unsigned char* smem) {
    if (record.segment_height == 0) {
      run_record<TileTraits<T, Dims, low, Kv, Variant>>(params, record, request, smem);
    } else {
      run_record<TileTraits<T, Dims, high, Kv, Variant>>(params, record, request, smem);
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
  // Why shared: what is read again where it is used holds no registers.
  __shared__ WorkRecord record;
  __shared__ Request request;
  pdl_wait();
  if (params.list[0] != params.tag) return;
  for (int index = first_record(params, blockIdx.x);
       index < first_record(params, blockIdx.x + 1); index = record.index + 1) {
    __syncthreads();
    if (threadIdx.x == 0) {
      record = checked_record(params, index, Kernel::kHigh);
      request = {record.qo_len, record.kv_len};
    }
    __syncthreads();
    Kernel::run(params, record, request, smem);
  }
}

}  // namespace ridgeline
