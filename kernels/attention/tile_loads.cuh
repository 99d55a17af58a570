// From global memory to the swizzled tiles of shared memory, in the background.
#pragma once

#include "attention/row_target.cuh"
#include "attention/tile_traits.cuh"
#include "common/cp_async.cuh"
#include "common/opaque.cuh"
#include "common/swizzle.cuh"

namespace ridgeline {

// Copies rows of kDim elements, of which `dim` exist; missing elements and the rows from num_valid
// on become zeros. Eight neighbouring threads take 128 bytes of a row at a time. A thread's rows
// are thread / 8 + pass * (kThreads / 8); `pointer(lane_row, row, pass, element)`, with these two
// summands, is read from where the row is valid. Why opaque: an element that is kept from step to
// step is kept as 64 bits.
template <int kRows, int kDim, int kThreads, typename Element, typename Pointer>
__device__ __forceinline__ void load_rows(uint32 tile, int thread, int dim, int num_valid,
                                          Pointer pointer) {
  constexpr int kRowBytes = kDim * int(sizeof(Element));
  constexpr int kChunk = 16 / int(sizeof(Element));
  constexpr int kRowsPerPass = kThreads / 8;
  const int first_row = thread / 8;
  const int last_row = num_valid - 1 - first_row;  // from first_row on
  const int lane_element = opaque(thread) % 8 * kChunk;
#pragma unroll
  for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
    const int row = pass * kRowsPerPass;
    const bool valid = row <= last_row;
    const Element* source = pointer(first_row, row, pass, lane_element);
    const uint32 destination = tile + swizzled_offset<kRowBytes>(first_row + row, thread % 8);
#pragma unroll
    for (int line = 0; line < kRowBytes / 128; ++line) {
      const int element = line * 8 * kChunk;
      cp_async_16(destination + line * 128, source + element,
                  valid && lane_element < dim - element);
    }
  }
}

// A warp loads four rows of a pass: each lane finds the place of one row of its warp's, and tells
// the others.
template <typename Traits>
__device__ __forceinline__ void load_query(const AttentionParams& params, const WorkItem& work,
                                           int num_rows, uint32 tile) {
  using T = typename Traits::T;
  constexpr int kRowsPerPass = Traits::kNumThreads / 8;
  static_assert(Traits::kTileQ / kRowsPerPass <= 8, "a warp has a lane for each of its rows");
  const int lane = threadIdx.x % 32;
  const int row = lane / 4 * kRowsPerPass + threadIdx.x / 32 * 4 + lane % 4;
  const RowTarget target = row_target(params, work, min(row, num_rows - 1));
  const int64 offset = target.token * params.q_stride_token + target.head * params.q_stride_head;
  load_rows<Traits::kTileQ, Traits::kQk, Traits::kNumThreads, T>(
      tile, threadIdx.x, params.head_dim_qk, num_rows,
      [&](int /*lane_row*/, int /*row*/, int pass, int element) {
        return static_cast<const T*>(params.q) +
               __shfl_sync(0xffffffffu, offset, pass * 4 + lane / 8) + element;
      });
}

template <typename Traits>
__device__ __forceinline__ void load_keys(const AttentionParams& params,
                                          const typename Traits::Kv& kv, uint32 tile, int thread,
                                          int first_token, int end) {
  const auto keys = kv.template keys<Traits::kLoaders>(first_token, end);
  load_rows<Traits::kKeys, Traits::kQk, Traits::kLoaders, typename Traits::Element>(
      tile, thread, params.head_dim_qk, end - first_token,
      [&](int lane_row, int row, int pass, int element) {
        return keys.at(lane_row, row, pass, element);
      });
}

template <typename Traits>
__device__ __forceinline__ void load_values(const AttentionParams& params,
                                            const typename Traits::Kv& kv, uint32 tile, int thread,
                                            int first_token, int end) {
  const auto values = kv.template values<Traits::kLoaders>(first_token, end);
  load_rows<Traits::kKeys, Traits::kVo, Traits::kLoaders, typename Traits::Element>(
      tile, thread, params.head_dim_vo, end - first_token,
      [&](int lane_row, int row, int pass, int element) {
        return values.at(lane_row, row, pass, element);
      });
}

}  // namespace ridgeline
