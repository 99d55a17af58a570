// From global memory to the swizzled tiles of shared memory, in the background.
#pragma once

#include "attention/tile_traits.cuh"
#include "common/cp_async.cuh"
#include "common/swizzle.cuh"

namespace ridgeline {

// Copies rows of kDim elements, of which `dim` exist; missing elements and the rows from num_valid
// on become zeros. Eight neighbouring threads take 128 bytes of a row at a time. A thread's rows
// are thread / 8 + pass * (kThreads / 8); `pointer(lane_row, row, pass, element)`, with these two
// summands, is read from where the row is valid.
template <int kRows, int kDim, int kThreads, typename Element, typename Pointer>
__device__ __forceinline__ void load_rows(uint32 tile, int thread, int dim, int num_valid,
                                          Pointer pointer) {
  constexpr int kRowBytes = kDim * int(sizeof(Element));
  constexpr int kChunk = 16 / int(sizeof(Element));
  constexpr int kRowsPerPass = kThreads / 8;
  const int first_row = thread / 8;
  const int last_row = num_valid - 1 - first_row;  // from first_row on
  const int lane_element = thread % 8 * kChunk;
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

template <typename Traits>
__device__ __forceinline__ void load_query(const AttentionParams& params, const WorkItem& work,
                                           int num_rows, uint32 tile) {
  using T = typename Traits::T;
  const int group_size = params.group_size.divisor;
  const T* base =
      static_cast<const T*>(params.q) + work.kv_head * group_size * params.q_stride_head;
  load_rows<Traits::kTileQ, Traits::kQk, Traits::kNumThreads, T>(
      tile, threadIdx.x, params.head_dim_qk, num_rows, [&](int lane_row, int row, int /*pass*/, int element) {
        const int packed = work.q_row_begin + min(lane_row + row, num_rows - 1);
        const int query = params.group_size.quotient(packed);
        return base + (work.q_begin + query) * params.q_stride_token +
               (packed - query * group_size) * params.q_stride_head + element;
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
