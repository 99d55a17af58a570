// target[target_pages[i]] = source[source_pages[i]] for whole pages of keys and values, byte for
// byte.
//
// Pages [num_outer, num_inner, head_dim] of any strides but a last one of 1, in GPU memory or in
// pinned host memory that the GPU has mapped. Even blocks copy keys, odd ones values. A page is cut
// into chunks of kPageChunk vectors of kVec bytes; a team of page_team() threads owns a chunk,
// thread t of a team of n takes its vectors t, t + n, ... A copy from or to a page that a pool does
// not have is skipped. All SMs; a page's vectors below 2^31, num_copies * chunks below 2^30.
#pragma once

#include "common/paging.cuh"
#include "common/vec.cuh"
#include "page/params.h"

namespace ridgeline {

struct CopyOffsets {
  int64 source;
  int64 target;
};

// Bytes from the pages' beginnings to one of their vectors.
template <int kVec>
__device__ __forceinline__ CopyOffsets vector_offsets(const CopyTensor& tensor, uint32 vec_idx) {
  const uint32 run = tensor.vecs_per_inner.quotient(vec_idx);
  const uint32 in_run = vec_idx - run * tensor.vecs_per_inner.divisor;
  const uint32 outer = tensor.num_inner.quotient(run);
  const uint32 inner = run - outer * tensor.num_inner.divisor;
  return {outer * tensor.source_outer_stride + inner * tensor.source_inner_stride + in_run * kVec,
          outer * tensor.target_outer_stride + inner * tensor.target_inner_stride + in_run * kVec};
}

template <int kVec>
__global__ void __launch_bounds__(kPageThreads)
    copy_pages(const __grid_constant__ CopyPagesParams params) {
  // Keys and values in turns: they lie side by side in most pools.
  const CopyTensor& tensor = params.tensors[blockIdx.x % 2];
  const uint32 team_size = tensor.team_size;
  const uint32 team_log2 = 31 - __clz(team_size);
  const uint32 lane = threadIdx.x & (team_size - 1);
  const uint32 row = blockIdx.x / 2 * (kPageThreads >> team_log2) + (threadIdx.x >> team_log2);
  if (row >= tensor.num_rows) return;
  const uint32 copy = tensor.chunks_per_page.quotient(row);
  const uint32 chunk = row - copy * tensor.chunks_per_page.divisor;
  const LoadedIndex from(params.source_pages, copy), to(params.target_pages, copy);
  const int64 source_page = from.get(params.source_pages),
              target_page = to.get(params.target_pages);
  if (source_page < 0 || source_page >= params.num_source_pages) return;
  if (target_page < 0 || target_page >= params.num_target_pages) return;

  const uint8* source =
      static_cast<const uint8*>(tensor.source) + source_page * tensor.source_page_stride;
  uint8* target = static_cast<uint8*>(tensor.target) + target_page * tensor.target_page_stride;
  const uint32 first = chunk * kPageChunk + lane;
  const auto copy_chunk = [&](const auto& offsets_of) {
    Vec<uint8, kVec> vecs[kPageSlots];
#pragma unroll
    for (int i = 0; i < kPageSlots; ++i) {
      const uint32 vec_idx = first + i * team_size;
      if (vec_idx < tensor.num_vecs) vecs[i] = load<kVec>(source + offsets_of(vec_idx).source);
    }
#pragma unroll
    for (int i = 0; i < kPageSlots; ++i) {
      const uint32 vec_idx = first + i * team_size;
      if (vec_idx < tensor.num_vecs) store(target + offsets_of(vec_idx).target, vecs[i]);
    }
  };
  // Why not for many pages: without the time that offsets take, loads and stores come more mixed,
  // and 1,024 pages of 64 KB take 2% longer (H200); 16 take 4% less.
  if (tensor.is_plain) {
    copy_chunk([](uint32 vec_idx) {
      const int64 offset = int64{vec_idx} * kVec;
      return CopyOffsets{offset, offset};
    });
  } else {
    copy_chunk([&](uint32 vec_idx) { return vector_offsets<kVec>(tensor, vec_idx); });
  }
}

}  // namespace ridgeline
