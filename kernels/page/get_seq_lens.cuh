// seq_lens[b] = (num_pages - 1) * page_size + last_page_len[b], with num_pages = indptr[b + 1] -
// indptr[b]; 0 when a request has no page. A thread owns a request. All SMs.
#pragma once

#include "common/paging.cuh"
#include "page/params.h"

namespace ridgeline {

__global__ void __launch_bounds__(kPageThreads)
    get_seq_lens(const __grid_constant__ SeqLensParams params) {
  const uint32 request = blockIdx.x * kPageThreads + threadIdx.x;
  if (request >= params.batch_size) return;
  const int32 begin = params.indptr[request], end = params.indptr[request + 1];
  const uint32 num_pages = end > begin ? static_cast<uint32>(end) - begin : 0;
  params.seq_lens[request] =
      static_cast<int32>(num_tokens_of(num_pages, params.last_page_len[request], params.page_size));
}

}  // namespace ridgeline
