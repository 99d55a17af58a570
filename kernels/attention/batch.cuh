// Attention for a batch of requests of any lengths, sm_75 and up: as in portable.cuh, with queries
// and keys of each request where the work list says. A CTA runs the records of its team's share
// (or, in a list by tile, one record), each a query tile of its own KV head against a range of
// keys; tiles of two heights may meet in one launch. Parts of cut tiles are added up by the CTA
// that finishes last, or by batch_combine.cuh.
//
// The list is the caller's: every field is held to its range, and a list of another configuration
// (its tag differs) runs nothing.
#pragma once

#include "attention/addressing.cuh"
#include "attention/batch_params.h"
#include "attention/cut_tiles.cuh"
#include "attention/tile.cuh"
#include "attention/variants.cuh"
#include "common/pdl.cuh"

namespace ridgeline {

__device__ __forceinline__ int held_to(int value, int low, int high) {
  return max(low, min(value, high));
}

// What a CTA is told to do: the list's records from `index` on, before `end`, the head of a team's
// heads that is its own, and the record to work on next, which arrives during the one before it.
struct Assignment {
  int index, end;
  int lane;
  WorkRecord next;
};

// A record as a CTA's item whose fields are in their ranges.
__device__ __forceinline__ BatchItem checked_item(const BatchAttentionParams& params,
                                                  const WorkRecord& record, int lane) {
  BatchItem item = {};
  item.height_idx = record.segment_height & 1;
  item.work.request = record.request;
  const int num_kv_heads = params.attention.num_kv_heads.divisor;
  item.work.kv_head = held_to(record.kv_head + lane, 0, num_kv_heads - 1);
  item.work.q_begin = held_to(record.q_begin, 0, params.num_tokens - 1);
  item.request.qo_len = held_to(record.qo_len, 1, params.num_tokens - item.work.q_begin);
  const int num_rows = item.request.qo_len * int(params.attention.group_size.divisor);
  item.work.q_row_begin = held_to(record.q_row_begin, 0, num_rows - 1);
  int64 most_keys = 0;
  if (params.form == KvForm::kPadded) {
    item.kv_origin = held_to(record.kv_origin, 0, params.num_indices - 1);
    most_keys = params.max_kv_len;
  } else {
    item.kv_origin = held_to(record.kv_origin, 0, params.num_indices);
    most_keys = int64(params.num_indices - item.kv_origin);
    if (is_paged(params.form)) most_keys *= params.page_size.divisor;
  }
  const int64 origin = is_paged(params.form) ? 0 : item.kv_origin;
  item.key_offset =
      item.work.kv_head * params.attention.k_stride_head + origin * params.k_origin_stride;
  item.value_offset =
      item.work.kv_head * params.attention.v_stride_head + origin * params.v_origin_stride;
  const int kv_len = record.kv_len;
  item.request.kv_len = kv_len < 0 ? 0 : kv_len < most_keys ? kv_len : int(most_keys);
  item.work.kv_end = held_to(record.kv_end, 0, item.request.kv_len);
  item.work.kv_begin = held_to(record.kv_begin, 0, item.work.kv_end);
  item.work.partial_row = -1;
  if (record.partial_row >= 0) {
    item.work.partial_row =
        min(min(record.partial_row, params.last_partial_row) + lane * int(params.slot_rows.divisor),
            params.last_partial_row);
  }
  return item;
}

// A record as four words at a time: a thread's loads start together.
__device__ __forceinline__ WorkRecord read_record(const int* words) {
  WorkRecord record;
  const int4* from = reinterpret_cast<const int4*>(words);
  int4* to = reinterpret_cast<int4*>(&record);
#pragma unroll
  for (int i = 0; i < kRecordWords / 4; ++i) to[i] = from[i];
  return record;
}

// Keeps which cut tile a CTA's first or last record is a part of, and has the tile copied.
__device__ __forceinline__ void keep_cut(const BatchAttentionParams& params,
                                         const WorkRecord& record, int place, OwnCuts& cuts) {
  if (record.partial_row < 0) return;
  cuts.index[place] = held_to(record.cut_tile, 0, params.max_cut_tiles - 1);
  const int* tile = params.list + kCutTilesAt + cuts.index[place] * kCutTileWords;
#pragma unroll
  for (int i = 0; i < kCutTileWords / 4; ++i) {
    cp_async_16(shared_address(&cuts.tiles[place]) + i * 16, tile + i * 4, true);
  }
}

// A CTA's assignment, with its first record in `next`; none where the list has another tag.
__device__ __forceinline__ Assignment read_assignment(const BatchAttentionParams& params,
                                                      bool may_go_by_tile) {
  const int4 header = *reinterpret_cast<const int4*>(params.list);
  const int team = min(int(params.team_size.quotient(blockIdx.x)), kMaxBatchCtas - 1);
  const int* share = params.list + kSharesAt + team * kShareWords;
  const int tile = params.attention.num_kv_heads.quotient(blockIdx.x);
  Assignment result;
  result.next = read_record(share);
  const int2 range = *reinterpret_cast<const int2*>(share + kRecordWords);
  result.lane = params.team_size.remainder(blockIdx.x);
  result.index = held_to(range.x, 0, params.max_records);
  result.end = blockIdx.x < params.num_ctas ? held_to(range.y, 0, params.max_records) : 0;
  if (may_go_by_tile) {
    const int64 place = min(tile, params.max_records - 1) * int64(kRecordWords);
    const WorkRecord of_tile = read_record(params.list + params.records_at + place);
    if (header.y != 0) {
      result.next = of_tile;
      result.lane = params.attention.num_kv_heads.remainder(blockIdx.x);
      result.index = tile;
      result.end = tile < min(header.z, params.max_records) ? tile + 1 : 0;
    }
  }
  if (header.x != params.tag) result.end = 0;
  return result;
}

template <typename Traits>
__device__ __forceinline__ void run_item(const BatchAttentionParams& params, BatchItem& item,
                                         Assignment& assignment, unsigned char* smem) {
  const auto fetch_next = [&] {
    if (threadIdx.x == 0 && assignment.index + 1 < assignment.end) {
      const int* record =
          params.list + params.records_at + (assignment.index + 1) * int64(kRecordWords);
#pragma unroll
      for (int i = 0; i < kRecordWords / 4; ++i) {
        cp_async_16(shared_address(&assignment.next) + i * 16, record + i * 4, true);
      }
    }
  };
  const auto get_work = [&](int) -> const WorkItem& { return item.work; };
  const auto make_kv = [&](const WorkItem&) { return typename Traits::Kv(params, item); };
  const auto keep = [&](KeyRange keys) -> const KeyRange& {
    if (threadIdx.x == 0) item.seen_by_all = keys;
    __syncthreads();
    return item.seen_by_all;
  };
  attend_tile<Traits>(params.attention, item.request, 0, get_work, make_kv, keep, fetch_next, smem);
}

template <typename T, typename Dims, typename Heights, typename Kv, typename Variant>
struct BatchKernel;

template <typename T, typename Dims, int kHeight, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<kHeight>, Kv, Variant> {
  static constexpr int kLow = kHeight;
  static constexpr int kHigh = kHeight;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params, BatchItem& item,
                                             Assignment& assignment, unsigned char* smem) {
    run_item<TileTraits<T, Dims, kHeight, Kv, Variant>>(params, item, assignment, smem);
  }
};

template <typename T, typename Dims, int low, int high, typename Kv, typename Variant>
struct BatchKernel<T, Dims, Heights<low, high>, Kv, Variant> {
  static constexpr int kLow = low;
  static constexpr int kHigh = high;
  static __device__ __forceinline__ void run(const BatchAttentionParams& params, BatchItem& item,
                                             Assignment& assignment, unsigned char* smem) {
    if (item.height_idx == 0) {
      run_item<TileTraits<T, Dims, low, Kv, Variant>>(params, item, assignment, smem);
    } else {
      run_item<TileTraits<T, Dims, high, Kv, Variant>>(params, item, assignment, smem);
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
  constexpr int kWarps =
      batch_block_size(Dims::kQk, Dims::kVo, Kernel::kLow, Kernel::kHigh, kSm) / 32;
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ BatchItem item;
  __shared__ Assignment assignment;
  __shared__ OwnCuts cuts;
  const bool finishes = Kernel::kHigh == 16 && params.attention.counters != nullptr;
  pdl_wait();
  if (threadIdx.x == 0) {
    const Assignment own = read_assignment(params, Kernel::kHigh > 16);
    item = checked_item(params, own.next, own.lane);
    assignment = own;
    cuts.index[0] = cuts.index[1] = -1;
    if (finishes && own.index < own.end) keep_cut(params, own.next, 0, cuts);
  }
  if (finishes && threadIdx.x >= 32) {
    clear_rows<T>(params, reinterpret_cast<const ListHeader*>(params.list)->num_tokens,
                  blockIdx.x * (kWarps - 1) + threadIdx.x / 32 - 1, gridDim.x * (kWarps - 1));
  }
  __syncthreads();
  while (assignment.index < assignment.end) {
    Kernel::run(params, item, assignment, smem + opaque(0));
    __syncthreads();
    if (threadIdx.x == 0 && ++assignment.index < assignment.end) {
      item = checked_item(params, assignment.next, assignment.lane);
      if (finishes) keep_cut(params, assignment.next, 1, cuts);
    }
    __syncthreads();
  }
  if (finishes) {
    finish<T, kWarps, groups_at_once(Dims::kVo, kSm)>(params, cuts, assignment.lane);
  }
}

}  // namespace ridgeline
