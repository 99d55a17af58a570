// What the kernels of the paged cache are told, and how rows are spread over threads. Shared by the
// kernels and the host.
#pragma once

#include "common/paging.h"
#include "common/types.h"

namespace ridgeline {

// Vectors that one thread has in flight.
constexpr int kPageSlots = 4;
constexpr uint32 kPageThreads = 128;
constexpr uint32 kPageChunk = kPageThreads * kPageSlots;  // vectors that a block moves at once

// Threads for a row of num_vecs vectors: a power of two, at least 4 so that neighbouring threads
// fill whole sectors, at most a block.
constexpr uint32 page_team(uint32 num_vecs) {
  uint32 team = 4;
  while (team < kPageThreads && team * kPageSlots < num_vecs) team *= 2;
  return team;
}

// New keys or values and the pool they go to. Strides count elements, or bytes where nothing is
// converted.
struct CacheSide {
  const void* source;  // [nnz, num_heads, head_dim]
  void* target;        // the pool
  int64 source_token_stride;
  int64 source_head_stride;
  PagedStrides target_strides;
  const float* scales;  // [num_heads], or one when scale_stride is 0; null: inverse_scale
  int64 scale_stride;   // elements
  float inverse_scale;  // what an element is multiplied by before it is rounded
};

struct AppendTensor : CacheSide {
  uint32 num_vecs;        // num_heads * head_dim / kVec
  uint32 team_size;       // page_team(num_vecs)
  Divider vecs_per_head;  // head_dim / kVec
};

struct AppendParams {
  AppendTensor tensors[2];
  Indices batch_indices;  // [nnz]
  Indices positions;      // [nnz]
  uint32 num_tokens;      // nnz
  PageTable table;
};

// Keys or values of two pools, whose pages are [num_outer, num_inner, head_dim]. Strides in bytes.
struct CopyTensor {
  const void* source;
  void* target;
  int64 source_page_stride, source_outer_stride, source_inner_stride;
  int64 target_page_stride, target_outer_stride, target_inner_stride;
  uint32 num_vecs;   // of a page
  uint32 team_size;  // page_team of a chunk
  uint32 num_rows;   // num_copies * chunks_per_page, below 2^30
  bool is_plain;     // few pages, each a run of bytes in both pools
  Divider chunks_per_page;
  Divider vecs_per_inner;  // head_dim
  Divider num_inner;
};

struct CopyPagesParams {
  CopyTensor tensors[2];
  Indices source_pages;  // [num_copies]
  Indices target_pages;  // [num_copies]
  int64 num_source_pages;
  int64 num_target_pages;
};

struct BatchIndicesParams {
  const int32* append_indptr;  // [batch_size + 1], tokens
  const int32* seq_lens;       // [batch_size], tokens after the append
  int32* batch_indices;        // [nnz]
  int32* positions;            // [nnz]
  uint32 batch_size;
  uint32 nnz;
};

struct SeqLensParams {
  const int32* indptr;         // [batch_size + 1], pages
  const int32* last_page_len;  // [batch_size], tokens
  int32* seq_lens;             // [batch_size], tokens
  uint32 batch_size;
  uint32 page_size;  // tokens
};

}  // namespace ridgeline
