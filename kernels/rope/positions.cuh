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
// nothing waits for the request's number; and the first round's with the warp's other loads.
template <>
struct PositionOf<RequestOffsets> {
  int32 begin;   // of the lane's probe
  int64 offset;  // of the lane's probe

  static __device__ __forceinline__ uint32 step_of(uint32 count) {
    return (count + kWarpSize) / (kWarpSize + 1);
  }
  static __device__ __forceinline__ uint32 probe_of(uint32 low, uint32 step) {
    return low + (threadIdx.x % kWarpSize + 1) * step - 1;
  }
  __device__ __forceinline__ void load_probe(const RequestOffsets& from, uint32 probe) {
    begin = probe <= from.batch_size ? from.indptr[probe] : 0x7fffffff;
    offset = probe < from.batch_size ? load_index(from.offsets, probe) : 0;
  }

  __device__ __forceinline__ void load(const RequestOffsets& from, uint32) {
    load_probe(from, probe_of(0, step_of(from.batch_size + 1)));
  }

  __device__ __forceinline__ int64 get(const RequestOffsets& from, uint32 token) {
    // indptr[low - 1] <= token < indptr[high], as far as indptr goes.
    uint32 low = 0, high = from.batch_size + 1;
    int64 start = 0;  // offsets - indptr of request low - 1
#pragma unroll 1
    while (true) {
      const uint32 step = step_of(high - low);
      const bool begun = probe_of(low, step) < high && begin <= static_cast<int64>(token);
      const uint32 num_begun = __popc(__ballot_sync(kFullWarp, begun));
      const uint32 last = num_begun == 0 ? 0 : num_begun - 1;
      const int64 last_start = __shfl_sync(kFullWarp, offset - begin, last);
      if (num_begun > 0) start = last_start;
      // The last part ends where nothing was looked at.
      if (num_begun < kWarpSize) high = min(high, low + (num_begun + 1) * step - 1);
      low += num_begun * step;
      if (low >= high) break;
      load_probe(from, probe_of(low, step_of(high - low)));
    }
    return low == 0 || low > from.batch_size ? 0 : start + token;
  }
};

}  // namespace ridgeline
