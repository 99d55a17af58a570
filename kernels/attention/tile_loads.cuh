// From global memory to the swizzled tiles of shared memory, in the background.
#pragma once

#include "attention/row_target.cuh"
#include "attention/tile_traits.cuh"
#include "common/cp_async.cuh"
#include "common/opaque.cuh"
#include "common/swizzle.cuh"

namespace ridgeline {

// A thread's share of the copy of rows of kDim elements, of which `dim` exist; missing elements and
// the rows from num_valid on become zeros. Eight neighbouring threads take 128 bytes of a row at a
// time; a thread's rows are thread / 8 + pass * (kThreads / 8). `rows.at(pass)` is the address of
// its first element in a pass, and is read from where the row is valid; with kAnyRow all are.
template <int kRows, int kDim, int kThreads, bool kAnyRow, typename Element, typename Rows>
struct RowCopies {
  static constexpr int kRowBytes = kDim * int(sizeof(Element));
  static constexpr int kChunk = 16 / int(sizeof(Element));
  static constexpr int kRowsPerPass = kThreads / 8;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static_assert((kRowsPerPass & (kRowsPerPass - 1)) == 0, "rows of a pass differ in other bits");

  Rows rows;
  uint32 destination;
  int last_row;      // from this thread's first on
  int num_elements;  // from this thread's first on

  __device__ __forceinline__ RowCopies(Rows rows, uint32 tile, int thread, int dim, int num_valid)
      : rows(rows),
        destination(tile + swizzled_offset<kRowBytes>(uint32(opaque(thread)) / 8,
                                                      uint32(opaque(thread)) % 8)),
        last_row(num_valid - 1 - int(uint32(opaque(thread)) / 8)),
        num_elements(dim - lane_element(thread)) {}

  // The first element of a row that a thread copies. Why opaque: kept from step to step it would
  // be kept as 64 bits.
  static __device__ __forceinline__ uint32 lane_element(int thread) {
    return uint32(opaque(thread)) % 8 * kChunk;
  }

  __device__ __forceinline__ void copy_all() const { copy_all<false>(false); }

  // kMayBeOnce: as cp_async_16_once().
  template <bool kMayBeOnce>
  __device__ __forceinline__ void copy_all(bool once) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass;
      const bool exists = kAnyRow || row <= last_row;
      const Element* source = rows.at(pass);
      // Of row thread / 8 + row: the summands share no bit of the last three.
      const uint32 target = (destination ^ ((row & 7) << 4)) + row * kRowBytes;
#pragma unroll
      for (int line = 0; line < kRowBytes / 128; ++line) {
        const int element = line * 8 * kChunk;
        if constexpr (kMayBeOnce) {
          cp_async_16_once(target + line * 128, source + element, exists && element < num_elements,
                           once);
        } else {
          cp_async_16(target + line * 128, source + element, exists && element < num_elements);
        }
      }
    }
  }
};

// Rows of the query tile, whose places the lanes of a warp know: eight lanes load a row of a pass
// together, and the pass's places are those of lanes pass * 4 and following.
template <typename T>
struct QueryRows {
  const T* base;
  int64 offset;

  __device__ __forceinline__ const T* at(int pass) const {
    return base + __shfl_sync(0xffffffffu, offset, pass * 4 + threadIdx.x % 32 / 8);
  }
};

__device__ __forceinline__ int64 query_offset(const AttentionParams& params, const WorkItem& work,
                                              int row) {
  const RowTarget target = row_target(params, work, row);
  return target.token * params.q_stride_token + target.head * params.q_stride_head;
}

// A warp loads four rows of a pass: each lane finds the place of one row of its warp's, and tells
// the others. Where there are more threads than that takes, each copies one chunk of a row: if some
// copied nothing, the compiler would have all that follows twice.
template <typename Traits>
__device__ __forceinline__ void load_query(const AttentionParams& params, const WorkItem& work,
                                           int num_rows, uint32 tile) {
  using T = typename Traits::T;
  constexpr int kRowsPerPass = Traits::kNumThreads / 8;
  if constexpr (kRowsPerPass > Traits::kTileQ) {
    constexpr int kChunksOfRow = Traits::kQueryRowBytes / 16;
    static_assert(Traits::kTileQ * kChunksOfRow == Traits::kNumThreads, "a chunk a thread");
    const int thread = opaque(int(threadIdx.x));
    const int row = uint32(thread) / kChunksOfRow, chunk = uint32(thread) % kChunksOfRow;
    const T* source = static_cast<const T*>(params.q) +
                      query_offset(params, work, min(row, num_rows - 1)) + chunk * 8;
    cp_async_16(tile + swizzled_offset<Traits::kQueryRowBytes>(row, chunk), source,
                row < num_rows && chunk * 8 < params.head_dim_qk);
  } else {
    static_assert(Traits::kTileQ / kRowsPerPass <= 8, "a warp has a lane for each of its rows");
    const int lane = threadIdx.x % 32;
    const int row = lane / 4 * kRowsPerPass + threadIdx.x / 32 * 4 + lane % 4;
    const int64 offset = query_offset(params, work, min(row, num_rows - 1));
    using Copies =
        RowCopies<Traits::kTileQ, Traits::kQk, Traits::kNumThreads, false, T, QueryRows<T>>;
    const QueryRows<T> rows = {static_cast<const T*>(params.q) + Copies::lane_element(threadIdx.x),
                               offset};
    Copies(rows, tile, threadIdx.x, params.head_dim_qk, num_rows).copy_all();
  }
}

template <typename Traits>
__device__ __forceinline__ auto key_copies(const AttentionParams& params,
                                           const typename Traits::Kv& kv, uint32 tile, int thread,
                                           int first_token, int end) {
  using Rows = typename Traits::Kv::Rows;
  // Keys from `end` on may be any, since the mask hides them; of values zeros are wanted, as the
  // product of a hidden one with its exponential of 0 is to be 0.
  using Copies = RowCopies<Traits::kKeys, Traits::kQk, Traits::kLoaders, Rows::kHasAllRows,
                           typename Traits::Element, Rows>;
  return Copies(kv.template keys<Traits::kKeys, Traits::kLoaders>(first_token, end,
                                                                  Copies::lane_element(thread)),
                tile, thread, params.head_dim_qk, end - first_token);
}

template <typename Traits>
__device__ __forceinline__ auto value_copies(const AttentionParams& params,
                                             const typename Traits::Kv& kv, uint32 tile, int thread,
                                             int first_token, int end) {
  using Rows = typename Traits::Kv::Rows;
  using Copies = RowCopies<Traits::kKeys, Traits::kVo, Traits::kLoaders, false,
                           typename Traits::Element, Rows>;
  return Copies(kv.template values<Traits::kKeys, Traits::kLoaders>(first_token, end,
                                                                    Copies::lane_element(thread)),
                tile, thread, params.head_dim_vo, end - first_token);
}

}  // namespace ridgeline
