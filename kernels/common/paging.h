// A paged key-value cache as kernels are told of it: the pool's strides and the batch's page table.
// Plain C++17, for host and device; the look-up is in paging.cuh.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// Where a token of a pool lies, in elements. One struct for both layouts: NHD has
// [num_pages, page_size, num_heads, head_dim], HND [num_pages, num_heads, page_size, head_dim].
struct PagedStrides {
  int64 page;
  int64 token;  // of the same page
  int64 head;

  constexpr int64 offset(int64 page_idx, int64 slot, int64 head_idx) const {
    return page_idx * page + slot * token + head_idx * head;
  }
};

// The pages of every request, CSR. Nothing is assumed of the contents: look-ups clamp.
struct PageTable {
  const int32* indices;  // [num_indices], page numbers
  const int32* indptr;   // [batch_size + 1], into indices
  uint32 num_indices;    // below 2^31
  uint32 batch_size;     // below 2^31
  uint32 num_pages;      // of the pool, below 2^31
  Divider page_size;     // tokens
};

// Numbers that come as int32 or int64.
struct Indices {
  const void* data;
  bool are_int64;
};

}  // namespace ridgeline
