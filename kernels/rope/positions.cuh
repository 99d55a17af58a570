// Where a token is in its sequence, for all lanes of its warp. load() issues what can be loaded at
// once; get() is called when the warp's other loads are on their way.
#pragma once

#include "common/paging.cuh"
#include "common/reduce.cuh"
#include "rope/params.h"

namespace ridgeline {

template <class Positions>
struct PositionOf;

template <>
struct PositionOf<PosIds> {
  int64 position;

  __device__ __forceinline__ void load(const PosIds& from, uint32 token) {
    position = load_index(from.ids, token);
  }
  __device__ __forceinline__ int64 get(const PosIds&, uint32) const { return position; }
};

// offsets[r] + token - indptr[r] for the request r with indptr[r] <= token < indptr[r + 1], by all
// lanes of a warp; 0 if there is none. Each round, 32 lanes cut what is left of indptr into 33
// parts: up to 31 requests take one round, 1,000 two. The offsets come with the bounds, so that
// nothing waits for the request's number.
__device__ __forceinline__ int64 position_in_request(const RequestOffsets& from, uint32 token) {
  const uint32 lane = threadIdx.x % kWarpSize;
  // indptr[low - 1] <= token < indptr[high], as far as indptr goes.
  uint32 low = 0, high = from.batch_size + 1;
  int64 start = 0;  // offsets - indptr of request low - 1
#pragma unroll 1
  while (low < high) {
    const uint32 step = (high - low + kWarpSize) / (kWarpSize + 1);
    const uint32 probe = low + (lane + 1) * step - 1;
    bool begun = false;
    int64 lane_start = 0;
    if (probe < high) {
      const int32 begin = from.indptr[probe];
      if (probe < from.batch_size) lane_start = load_index(from.offsets, probe) - begin;
      begun = begin <= static_cast<int64>(token);
    }
    const uint32 num_begun = __popc(__ballot_sync(kFullWarp, begun));
    const int64 last_start = __shfl_sync(kFullWarp, lane_start, num_begun == 0 ? 0 : num_begun - 1);
    if (num_begun > 0) start = last_start;
    // The last part ends where nothing was looked at.
    if (num_begun < kWarpSize) high = min(high, low + (num_begun + 1) * step - 1);
    low += num_begun * step;
  }
  return low == 0 || low > from.batch_size ? 0 : start + token;
}

template <>
struct PositionOf<RequestOffsets> {
  __device__ __forceinline__ void load(const RequestOffsets&, uint32) {}
  __device__ __forceinline__ int64 get(const RequestOffsets& from, uint32 token) const {
    return position_in_request(from, token);
  }
};

}  // namespace ridgeline
