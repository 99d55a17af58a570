// From a token of a request to its place in the pool. The contents of index tensors are not
// trusted: whatever they hold, no address outside the table or the pool is formed. What is written
// goes nowhere when its place does not exist (place_of); what is read comes from a page of the pool
// (clamped_page), which may be the wrong one.
#pragma once

#include "common/paging.h"

namespace ridgeline {

constexpr int64 kMaxPosition = 0x7fffffff;

// A number on its way: nothing waits for it until get(). Why not an int64 at once: one that comes
// as int32 would be waited for where it is extended, before any later load.
struct LoadedIndex {
  int32 low, high;

  __device__ __forceinline__ LoadedIndex() : low(0), high(0) {}

  __device__ __forceinline__ LoadedIndex(const Indices& from, uint32 i) : LoadedIndex() {
    const int32* words = static_cast<const int32*>(from.data) + (uint64{i} << from.are_int64);
    low = words[0];
    if (from.are_int64) high = words[1];
  }

  // With the same indices.
  __device__ __forceinline__ int64 get(const Indices& from) const {
    const uint32 upper = static_cast<uint32>(from.are_int64 ? high : low >> 31);
    return static_cast<int64>(uint64{upper} << 32 | static_cast<uint32>(low));
  }
};

__device__ __forceinline__ uint32 clamped(int32 x, uint32 low, uint32 high) {
  return min(max(static_cast<uint32>(max(x, 0)), low), high);
}

// A request's part of the table: begin <= end <= num_indices.
struct PageRange {
  uint32 begin;
  uint32 end;

  __device__ __forceinline__ uint32 size() const { return end - begin; }
};

__device__ __forceinline__ PageRange page_range(const PageTable& table, int32 first, int32 last) {
  const uint32 begin = clamped(first, 0, table.num_indices);
  return {begin, clamped(last, begin, table.num_indices)};
}

__device__ __forceinline__ PageRange pages_of(const PageTable& table, uint32 request) {
  return page_range(table, table.indptr[request], table.indptr[request + 1]);
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

// The bounds of what is guessed to be a token's pages, on their way before its request is known: in
// a batch of one token each, request t has token t.
struct GuessedPages {
  uint32 request;
  int32 first, last;

  __device__ __forceinline__ GuessedPages() {}

  __device__ __forceinline__ GuessedPages(const PageTable& table, uint32 token)
      : request(token < table.batch_size ? token : 0), first(0), last(0) {
    if (table.batch_size == 0) return;
    first = table.indptr[request];
    last = table.indptr[request + 1];
  }
};

__device__ __forceinline__ PageEntry page_entry_in(const PageTable& table, const PageRange& pages,
                                                   uint32 position) {
  const uint32 page_idx = table.page_size.quotient(position);
  const uint32 slot = position - page_idx * table.page_size.divisor;
  return {page_idx < pages.size(), pages.begin + page_idx, slot};
}

__device__ __forceinline__ PageEntry page_entry_of(const PageTable& table, int64 request,
                                                   int64 position, const GuessedPages& guess) {
  if (position < 0 || position > kMaxPosition) return {false, 0, 0};
  const uint32 at = static_cast<uint32>(position);
  if (request == guess.request) {
    return page_entry_in(table, page_range(table, guess.first, guess.last), at);
  }
  if (request < 0 || request >= table.batch_size) return {false, 0, 0};
  return page_entry_in(table, pages_of(table, static_cast<uint32>(request)), at);
}

// What the table says there, on its way; no page of the pool if there is nothing.
__device__ __forceinline__ uint32 fetch_page(const PageTable& table, const PageEntry& entry) {
  return entry.exists ? static_cast<uint32>(table.indices[entry.table_idx]) : table.num_pages;
}

// The place of a request's token, if the request, its page and that page of the pool exist. In
// steps, so that a kernel can do other work while each of them waits for its loads.
__device__ __forceinline__ TokenPlace place_of(const PageTable& table, const PageEntry& entry,
                                               uint32 page) {
  return {page < table.num_pages, page, entry.slot};
}

__device__ __forceinline__ TokenPlace place_of(const PageTable& table, int64 request,
                                               int64 position, const GuessedPages& guess) {
  const PageEntry entry = page_entry_of(table, request, position, guess);
  return place_of(table, entry, fetch_page(table, entry));
}

}  // namespace ridgeline
