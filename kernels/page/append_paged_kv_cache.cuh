// cache[page, slot, head] = cast(append[token, head]): new keys and values go to their places in a
// paged pool, page = kv_indices[kv_indptr[request] + position / page_size], slot = position %
// page_size.
//
// append [nnz, num_heads, head_dim] and a pool in either layout, any strides but a last one of 1.
// blockIdx.y is 0 for keys, 1 for values. A team of page_team() threads owns a token; thread t of a
// team of n takes vectors t, t + n, ... of the token's heads, kPageSlots in flight. The data is on
// its way while the page table is looked up. A token whose place does not exist is skipped. All
// SMs, any head_dim and page size; nnz and a token's elements below 2^31.
#pragma once

#include "common/paging.cuh"
#include "page/cast.cuh"
#include "page/params.h"

namespace ridgeline {

template <class Cast>
struct AppendRow {
  using Source = Vec<typename Cast::From, Cast::kVec>;
  struct Fetched {
    Source vecs[kPageSlots];
  };
  const AppendTensor& tensor;
  const typename Cast::From* source;

  __device__ __forceinline__ AppendRow(const AppendTensor& tensor, uint32 token)
      : tensor(tensor),
        source(static_cast<const typename Cast::From*>(tensor.source) +
               token * tensor.source_token_stride) {}

  __device__ __forceinline__ void fetch(Fetched& fetched, uint32 first) const {
#pragma unroll
    for (int i = 0; i < kPageSlots; ++i) {
      const uint32 vec_idx = first + i * tensor.team_size;
      if (vec_idx >= tensor.num_vecs) continue;
      const uint32 head = tensor.vecs_per_head.quotient(vec_idx);
      const uint32 in_head = vec_idx - head * tensor.vecs_per_head.divisor;
      fetched.vecs[i] =
          load<Cast::kVec>(source + head * tensor.source_head_stride + in_head * Cast::kVec);
    }
  }

  __device__ __forceinline__ void store(const Fetched& fetched, const TokenPlace& place,
                                        uint32 first) const {
    typename Cast::To* target = static_cast<typename Cast::To*>(tensor.target) +
                                tensor.target_strides.offset(place.page, place.slot, 0);
#pragma unroll
    for (int i = 0; i < kPageSlots; ++i) {
      const uint32 vec_idx = first + i * tensor.team_size;
      if (vec_idx >= tensor.num_vecs) continue;
      const uint32 head = tensor.vecs_per_head.quotient(vec_idx);
      const uint32 in_head = vec_idx - head * tensor.vecs_per_head.divisor;
      ridgeline::store(target + head * tensor.target_strides.head + in_head * Cast::kVec,
                       Cast::apply(fetched.vecs[i], inverse_scale(head)));
    }
  }

  __device__ __forceinline__ float inverse_scale(uint32 head) const {
    if constexpr (!Cast::kScales) return 1.0f;
    return inverse_scale_of(tensor, head);
  }
};

template <class Cast>
__global__ void __launch_bounds__(kPageThreads)
    append_paged_kv_cache(const __grid_constant__ AppendParams params) {
  const AppendTensor& tensor = params.tensors[blockIdx.y];
  const uint32 team_size = tensor.team_size;
  const uint32 team_log2 = 31 - __clz(team_size);
  const uint32 lane = threadIdx.x & (team_size - 1);
  const uint32 token = blockIdx.x * (kPageThreads >> team_log2) + (threadIdx.x >> team_log2);
  if (token >= params.num_tokens) return;

  const AppendRow<Cast> row(tensor, token);
  typename AppendRow<Cast>::Fetched fetched;
  row.fetch(fetched, lane);
  const LoadedIndex request(params.batch_indices, token), position(params.positions, token);
  const GuessedPages guess(params.table, token);
  const TokenPlace place = place_of(params.table, request.get(params.batch_indices),
                                    position.get(params.positions), guess);
  if (!place.exists) return;

  row.store(fetched, place, lane);
  const uint32 step = team_size * kPageSlots;
  for (uint32 first = lane + step; first < tensor.num_vecs; first += step) {
    row.fetch(fetched, first);
    row.store(fetched, place, first);
  }
}

}  // namespace ridgeline
