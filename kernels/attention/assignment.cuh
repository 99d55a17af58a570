// What a CTA is told to do: its share of a batch's work list, every field of which is held to its
// range here.
#pragma once

#include "attention/batch_params.h"
#include "attention/cut_tiles.cuh"
#include "attention/work_item.cuh"
#include "common/arch.cuh"
#include "common/cp_async.cuh"
#include "common/ldmatrix.cuh"
#include "common/opaque.cuh"

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

// A record as a CTA's item whose fields are in their ranges, in a cache of elements T.
template <typename T>
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
  int kv_origin = 0;
  int64 most_keys = 0;
  if (params.form == KvForm::kPadded) {
    kv_origin = held_to(record.kv_origin, 0, params.num_indices - 1);
    most_keys = params.max_kv_len;
  } else {
    kv_origin = held_to(record.kv_origin, 0, params.num_indices);
    most_keys = int64(params.num_indices - kv_origin);
    if (is_paged(params.form)) most_keys *= params.page_size.divisor;
  }
  item.table_address =
      reinterpret_cast<uint64>(params.kv_indices) + kv_origin * uint64(sizeof(int));
  const int64 origin = is_paged(params.form) ? 0 : kv_origin;
  item.key_address = reinterpret_cast<uint64>(params.attention.k) +
                     sizeof(T) * (item.work.kv_head * params.attention.k_stride_head +
                                  origin * params.k_origin_stride);
  item.value_address = reinterpret_cast<uint64>(params.attention.v) +
                       sizeof(T) * (item.work.kv_head * params.attention.v_stride_head +
                                    origin * params.v_origin_stride);
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

// Starts to copy the record `ahead` after the one that is worked on into `next`. Thread 0 calls it.
__device__ __forceinline__ void fetch_record(const BatchAttentionParams& params,
                                             Assignment& assignment, int ahead) {
  if (assignment.index + ahead >= assignment.end) return;
  const int* record =
      params.list + params.records_at + (assignment.index + ahead) * int64(kRecordWords);
#pragma unroll
  for (int i = 0; i < kRecordWords / 4; ++i) {
    cp_async_16(shared_address(&assignment.next) + i * 16, record + i * 4, true);
  }
}

// Whether the list has nothing for a CTA that starts when others are done. Why not asked of the
// first ones: to those the header comes from further away, with their share.
__device__ __forceinline__ bool is_spare(const BatchAttentionParams& params) {
  if (blockIdx.x < params.num_at_once) return false;
  const ListHeader& header = *reinterpret_cast<const ListHeader*>(params.list);
  return header.by_tile != 0
             ? int(params.attention.num_kv_heads.quotient(blockIdx.x)) >= header.num_records
             : int(params.team_size.quotient(blockIdx.x)) >= header.num_ranges;
}

// Of a list by tile: the first CTA that has no whole tile, but a part of one that is split. Given
// the header's first words.
__device__ __forceinline__ int first_split(const BatchAttentionParams& params, const int4& header) {
  return header.z * int(params.attention.num_kv_heads.divisor) - (header.y - 1);
}

// Where the calling CTA has a part of a tile that is split, kLow of its kHigh rows, makes it the
// CTA's item. Why apart: whole tiles do not wait for it.
template <typename T, int kLow, int kHigh>
__device__ __forceinline__ void take_part(const BatchAttentionParams& params, BatchItem& item,
                                          Assignment& assignment) {
  constexpr int kParts = kHigh / kLow;
  const int4 header = *reinterpret_cast<const int4*>(params.list);
  const int first = first_split(params, header);
  const int part = int(blockIdx.x) - first;
  if (header.x != params.tag || header.y < 2 || part < 0) return;
  const int number = held_to(first + part / kParts, 0, blockIdx.x);
  const int tile = params.attention.num_kv_heads.quotient(number);
  if (tile >= min(header.z, params.max_records)) return;
  WorkRecord record = read_record(params.list + params.records_at + tile * int64(kRecordWords));
  record.segment_height = 0;
  record.q_row_begin += part % kParts * kLow;
  if (record.q_row_begin >= record.qo_len * int(params.attention.group_size.divisor)) return;
  item = checked_item<T>(params, record, params.attention.num_kv_heads.remainder(number));
  assignment.index = tile;
  assignment.end = tile + 1;
}

// A CTA's assignment, with its first record in `next`; none where the list has another tag.
__device__ __forceinline__ Assignment read_assignment(const BatchAttentionParams& params,
                                                      bool may_go_by_tile, bool may_split) {
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
    WorkRecord of_tile = read_record(params.list + params.records_at + place);
    if constexpr (kSm >= 90) {
      // Why opaque: the compiler would read none of it before the header has arrived.
      of_tile.segment_height = opaque(of_tile.segment_height);
      of_tile.q_begin = opaque(of_tile.q_begin);
      of_tile.kv_begin = opaque(of_tile.kv_begin);
    }
    if (header.y != 0) {
      result.next = of_tile;
      result.lane = params.attention.num_kv_heads.remainder(blockIdx.x);
      result.index = tile;
      bool exists = tile < min(header.z, params.max_records);
      if (may_split) exists = exists && int(blockIdx.x) < first_split(params, header);
      result.end = exists ? tile + 1 : 0;
    }
  }
  if (header.x != params.tag) result.end = 0;
  return result;
}

}  // namespace ridgeline
