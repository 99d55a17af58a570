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
  LoadedIndex position;

  __device__ __forceinline__ void load(const PosIds& from, uint32 token) {
    position = LoadedIndex(from.ids, token);
  }
  __device__ __forceinline__ int64 get(const PosIds& from, uint32) const {
    return position.get(from.ids);
  }
};

// offsets[r] + token - indptr[r] for the request r with indptr[r] <= token < indptr[r + 1], by all
// lanes of a warp; 0 if there is none. Each round, kProbes looks of 32 lanes cut what is left of
// indptr into kProbes * 32 + 1 parts: up to 95 requests take one round, 9,000 two. The offsets come
// with the bounds, so that nothing waits for the request's number; and the first round's with the
// warp's other loads.
template <>
struct PositionOf<RequestOffsets> {
  static constexpr uint32 kProbes = 3;
  static constexpr uint32 kLooks = kProbes * kWarpSize;
  int32 begins[kProbes];
  LoadedIndex offsets[kProbes];

  static __device__ __forceinline__ uint32 step_of(uint32 count) {
    return (count + kLooks) / (kLooks + 1);
  }
  static __device__ __forceinline__ uint32 place_of(uint32 low, uint32 step, uint32 probe) {
    return low + (probe * kWarpSize + threadIdx.x % kWarpSize + 1) * step - 1;
  }
  __device__ __forceinline__ void look(const RequestOffsets& from, uint32 low, uint32 step) {
#pragma unroll
    for (uint32 probe = 0; probe < kProbes; ++probe) {
      const uint32 at = place_of(low, step, probe);
      begins[probe] = at <= from.batch_size ? from.indptr[at] : 0x7fffffff;
      offsets[probe] = at < from.batch_size ? LoadedIndex(from.offsets, at) : LoadedIndex();
    }
  }

  __device__ __forceinline__ void load(const RequestOffsets& from, uint32) {
    look(from, 0, step_of(from.batch_size + 1));
  }

  __device__ __forceinline__ int64 get(const RequestOffsets& from, uint32 token) {
    // indptr[low - 1] <= token < indptr[high], as far as indptr goes.
    uint32 low = 0, high = from.batch_size + 1;
    int64 start = 0;  // offsets - indptr of request low - 1
#pragma unroll 1
    while (true) {
      const uint32 step = step_of(high - low);
      uint32 num_begun = 0;
      int64 last_start = 0;  // of the lane's last probe up to the warp's last that has begun
#pragma unroll
      for (uint32 probe = 0; probe < kProbes; ++probe) {
        const bool begun =
            place_of(low, step, probe) < high && begins[probe] <= static_cast<int64>(token);
        const uint32 votes = __ballot_sync(kFullWarp, begun);
        if (votes != 0) last_start = offsets[probe].get(from.offsets) - begins[probe];
        num_begun += __popc(votes);
      }
      const uint32 last = (num_begun + kWarpSize - 1) % kWarpSize;
      last_start = __shfl_sync(kFullWarp, last_start, last);
      if (num_begun > 0) start = last_start;
      // The last part ends where nothing was looked at.
      if (num_begun < kLooks) high = min(high, low + (num_begun + 1) * step - 1);
      low += num_begun * step;
      if (low >= high) break;
      look(from, low, step_of(high - low));
    }
    return low == 0 || low > from.batch_size ? 0 : start + token;
  }
};

}  // namespace ridgeline
