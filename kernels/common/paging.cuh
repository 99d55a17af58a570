// From a token of a request to its place in the pool. The contents of index tensors are not
// trusted: whatever they hold, no address outside the table or the pool is formed. What is written
// goes nowhere when its place does not exist (place_of); what is read comes from a page of the pool
// (clamped_page), which may be the wrong one.
#pragma once

#include "common/paging.h"

namespace ridgeline {

constexpr int64 kMaxPosition = 0x7fffffff;

__device__ __forceinline__ int64 load_index(const Indices& indices, uint32 i) {
  return indices.are_int64 ? static_cast<const int64*>(indices.data)[i]
                           : static_cast<const int32*>(indices.data)[i];
}

__device__ __forceinline__ uint32 clamped(int32 x, uint32 low, uint32 high) {
  return min(max(static_cast<uint32>(max(x, 0)), low), high);
}

// A request's part of the table: begin <= end <= num_indices.
struct PageRange {
  uint32 begin;
  uint32 end;

  __device__ __forceinline__ uint32 size() const { return end - begin; }
};

__device__ __forceinline__ PageRange pages_of(const PageTable& table, uint32 request) {
  const int32 first = table.indptr[request], last = table.indptr[request + 1];
  const uint32 begin = clamped(first, 0, table.num_indices);
  return {begin, clamped(last, begin, table.num_indices)};
}

// Tokens in that many pages, the last of which holds last_page_len. 0 pages: no tokens.
__device__ __forceinline__ int64 num_tokens_of(uint32 num_pages, int32 last_page_len,
                                               uint32 page_size) {
  if (num_pages == 0) return 0;
  return int64{num_pages - 1} * page_size + clamped(last_page_len, 0, page_size);
}

// The page that the table names at one of its places; the nearest of the pool when there is no such
// page. The pool must have a page.
__device__ __forceinline__ uint32 clamped_page(const PageTable& table, uint32 table_idx) {
  return clamped(table.indices[table_idx], 0, table.num_pages - 1);
}

struct TokenPlace {
  bool exists;
  uint32 page;
  uint32 slot;
};

// Where the table names the page of a request's token, if the request and the page exist.
struct PageEntry {
  bool exists;
  uint32 table_idx;
  uint32 slot;
};

__device__ __forceinline__ PageEntry page_entry_of(const PageTable& table, int64 request,
                                                   int64 position) {
  if (request < 0 || request >= table.batch_size) return {false, 0, 0};
  if (position < 0 || position > kMaxPosition) return {false, 0, 0};
  const PageRange pages = pages_of(table, static_cast<uint32>(request));
  const uint32 page_idx = table.page_size.quotient(static_cast<uint32>(position));
  const uint32 slot = static_cast<uint32>(position) - page_idx * table.page_size.divisor;
  return {page_idx < pages.size(), pages.begin + page_idx, slot};
}

// The place of a request's token, if the request, its page and that page of the pool exist. In two
// steps, so that a kernel can do other work while each of them waits for its loads.
__device__ __forceinline__ TokenPlace place_of(const PageTable& table, const PageEntry& entry) {
  const uint32 page =
      entry.exists ? static_cast<uint32>(table.indices[entry.table_idx]) : table.num_pages;
  return {page < table.num_pages, page, entry.slot};
}

__device__ __forceinline__ TokenPlace place_of(const PageTable& table, int64 request,
                                               int64 position) {
  return place_of(table, page_entry_of(table, request, position));
}

}  // namespace ridgeline
