// For each appended token its request and its position there: token t of request b,
// append_indptr[b]
// <= t < append_indptr[b + 1], has position seq_lens[b] - append_indptr[b + 1] + t. Tokens of no
// request get -1, -1.
//
// A thread owns a token and finds its request by binary search, which ends at a request of the
// batch whatever append_indptr holds. All SMs; launch: kPageThreads threads, one for each token.
#pragma once

#include "common/paging.cuh"
#include "page/params.h"

namespace ridgeline {

__global__ void __launch_bounds__(kPageThreads)
    get_batch_indices_positions(const __grid_constant__ BatchIndicesParams params) {
  const uint32 token = blockIdx.x * kPageThreads + threadIdx.x;
  if (token >= params.nnz) return;
  if (params.batch_size == 0) {
    params.batch_indices[token] = -1;
    params.positions[token] = -1;
    return;
  }

  // The last request that begins at or before the token.
  uint32 request = 0, after = params.batch_size;
  while (after - request > 1) {
    const uint32 middle = request + (after - request) / 2;
    if (params.append_indptr[middle] <= static_cast<int32>(token)) {
      request = middle;
    } else {
      after = middle;
    }
  }
  const int32 begin = params.append_indptr[request], end = params.append_indptr[request + 1];
  const bool found = begin <= static_cast<int32>(token) && static_cast<int32>(token) < end;
  // Why unsigned: garbage may wrap around, it must not be undefined.
  const uint32 position = static_cast<uint32>(params.seq_lens[request]) - end + token;
  params.batch_indices[token] = found ? static_cast<int32>(request) : -1;
  params.positions[token] = found ? static_cast<int32>(position) : -1;
}

}  // namespace ridgeline
