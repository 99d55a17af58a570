// What the scheduler knows of requests and of their query tiles, and the sums and searches that it
// works with.
#pragma once

#include "attention/batch_params.h"
#include "attention/work_item.cuh"

namespace ridgeline {

inline constexpr int kMaxLength = 1 << 30;
// Of these, so many are kept in shared memory.
inline constexpr int kRequestsInSmem = 512;
inline constexpr int kItemsInSmem = 768;
// Keys of a request times bundles: with so few the costs of kItemsInSmem items add up to 31 bits.
inline constexpr int kFewKeys = 1 << 23;

struct alignas(16) ScheduledRequest {
  int q_begin;
  int kv_origin;
  Request lengths;
};
static_assert(sizeof(ScheduledRequest) == kRequestWords * 4, "whole words");

// A query tile, or a part of one, and its own keys.
struct alignas(16) ScheduledItem {
  int request;
  int q_row_begin;
  int first_kv_tile;
  int end_key;
};
static_assert(sizeof(ScheduledItem) == kItemWords * 4, "whole words");

__device__ __forceinline__ int clamped(int value, int low, int high) {
  return max(low, min(value, high));
}

// The segment that a request belongs to.
template <int kSegments>
__device__ __forceinline__ int segment_of(const ScheduleParams<kSegments>& params, int request) {
  return kSegments > 1 && request >= params.segments[0].batch_size ? 1 : 0;
}

// The number of a segment's first request.
template <int kSegments>
__device__ __forceinline__ int first_request(const ScheduleParams<kSegments>& params, int segment) {
  return segment == 0 ? 0 : params.segments[0].batch_size;
}

// Rows of q that belong to the requests of a segment.
template <int kSegments>
__device__ __forceinline__ int tokens_of(const ScheduleSegment& segment) {
  if (kSegments > 1 && segment.form == KvForm::kSingle) return segment.num_tokens;
  return segment.qo_indptr == nullptr
             ? segment.batch_size
             : clamped(segment.qo_indptr[segment.batch_size], 0, segment.num_tokens);
}

template <int kSegments>
__device__ __forceinline__ ScheduledRequest scheduled_request(const ScheduleParams<kSegments>& all,
                                                              int number) {
  const int segment_idx = segment_of(all, number);
  const ScheduleSegment& params = all.segments[segment_idx];
  const int request = number - first_request(all, segment_idx);
  if (kSegments > 1 && params.form == KvForm::kSingle) {
    return {0, 0, {params.num_tokens, params.single_kv_len}};
  }
  // All loads before anything waits for one.
  const bool ragged_queries = params.qo_indptr != nullptr;
  const int q_begin = ragged_queries ? params.qo_indptr[request] : request;
  const int q_end = ragged_queries ? params.qo_indptr[request + 1] : request + 1;
  const int kv_begin = params.kv_indptr != nullptr ? params.kv_indptr[request] : request;
  const int kv_end = params.kv_indptr != nullptr ? params.kv_indptr[request + 1] : 0;
  const int given = params.kv_lens != nullptr ? params.kv_lens[request] : 0;

  ScheduledRequest result;
  result.q_begin = clamped(q_begin, 0, params.num_tokens);
  const int qo_len = clamped(q_end, result.q_begin, params.num_tokens) - result.q_begin;
  result.lengths.qo_len = min(qo_len, params.max_q_len);
  result.kv_origin = clamped(kv_begin, 0, kMaxLength);
  const int64 count = int64(kv_end) - result.kv_origin;
  int64 kv_len = given;
  if (params.form == KvForm::kRagged) kv_len = count;
  if (params.form == KvForm::kPagedByLastPage) {
    kv_len = count > 0 ? (count - 1) * params.page_size + clamped(given, 0, params.page_size) : 0;
  }
  result.lengths.kv_len = kv_len < 0 ? 0 : kv_len > kMaxLength ? kMaxLength : int(kv_len);
  return result;
}

template <int kSegments>
__device__ __forceinline__ int num_rows_of(const ScheduleParams<kSegments>& params,
                                           const Request& request) {
  return request.qo_len * int(params.group_size.divisor);
}

// Index of a request's tile height; lists that are not tall have one height only.
template <bool kTall>
__device__ __forceinline__ int height_of(const ScheduleSegment& segment, int num_rows) {
  const bool low =
      !kTall || segment.num_heights == 1 || num_rows <= int(segment.heights[0].tile_q.divisor);
  return low ? 0 : 1;
}

__device__ __forceinline__ int kv_tiles_up_to(const TileHeight& height, int key) {
  return int(height.kv_tile.quotient(key + height.kv_tile.divisor - 1));
}

// KV tiles of an item.
__device__ __forceinline__ int num_kv_tiles(const TileHeight& height, const ScheduledItem& item) {
  return max(0, kv_tiles_up_to(height, item.end_key) - item.first_kv_tile);
}

// A query tile of a request with all its keys. In lists that are not tall it is the only one.
template <bool kTall, int kSegments>
__device__ __forceinline__ ScheduledItem whole_tile(const ScheduleParams<kSegments>& params,
                                                    const ScheduledRequest& of,
                                                    const TileHeight& height, int request,
                                                    int q_tile) {
  const int row_begin = kTall ? q_tile * int(height.tile_q.divisor) : 0;
  int first_query = 0;
  int last_query = of.lengths.qo_len - 1;
  if (kTall) {
    const int last_row =
        min(row_begin + int(height.tile_q.divisor), num_rows_of(params, of.lengths)) - 1;
    first_query = params.group_size.quotient(row_begin);
    last_query = params.group_size.quotient(last_row);
  }
  const ScheduleSegment& segment = params.segments[segment_of(params, request)];
  const bool causal = segment.causal != 0;
  const int begin = masked_keys(of.lengths, first_query, causal, segment.window_left).begin;
  const int end = masked_keys(of.lengths, last_query, causal, segment.window_left).end;
  return {request, row_begin, int(height.kv_tile.quotient(begin)), max(end, 0)};
}

// Parts that batch_invariant cuts a request of one query tile into.
__device__ __forceinline__ int invariant_pieces(const TileHeight& height, int num_tiles) {
  return height.tile_q.divisor != 16 ? 1
                                     : clamped(num_tiles / kInvariantTiles, 1, kInvariantPieces);
}

// What the threads of a block hold, added up.
template <typename T>
struct Sums {
  T before;  // of the threads before this one
  T total;
};

// Why not inlined: the code comes from memory too. Calls take turns with two of `warp_sums`, which
// spares a barrier.
template <int kThreads, typename T>
__device__ __noinline__ Sums<T> exclusive_sum(T value, T* warp_sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  constexpr int kWarps = kThreads / 32;
  T of_warps = lane < kWarps ? warp_sums[lane] : 0;
#pragma unroll
  for (int distance = 1; distance < kWarps; distance *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, of_warps, distance);
    if (lane >= distance) of_warps += other;
  }
  const T before = __shfl_sync(0xffffffffu, of_warps, max(warp - 1, 0));
  const T total = __shfl_sync(0xffffffffu, of_warps, kWarps - 1);
  return {sum - value + (warp == 0 ? 0 : before), total};
}

// The last i in [first, count) with start(i) <= value, given start(first) <= value. Three places
// at a time, whose loads are on their way together.
template <typename T, typename Start>
__device__ __forceinline__ int last_at_most(int first, int count, T value, Start start) {
  int low = first, high = count;
#pragma unroll 1
  while (high - low > 1) {
    const int step = (high - low + 3) / 4;
    const int a = low + step, b = min(a + step, high - 1), c = min(b + step, high - 1);
    const bool from_a = start(a) <= value, from_b = start(b) <= value, from_c = start(c) <= value;
    low = from_c ? c : from_b ? b : from_a ? a : low;
    high = !from_a ? a : !from_b ? b : !from_c ? c : high;
  }
  return low;
}

}  // namespace ridgeline
