// Paged caches and page tables as arguments of ops: their checks, and what kernels are told of
// them. Only shapes, strides and dtypes are looked at; the contents stay on the device.
#pragma once

#include <array>

#include "common/paging.h"
#include "runtime/check.h"

namespace ridgeline {

inline constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;  // of tokens, pages and requests

// Keys or values of a cache. One that is stacked, with a dimension of 2 (keys, values) after the
// first, is looked at without a view of its half, which would cost a microsecond.
class HalfCache {
 public:
  HalfCache(const char* op, const char* name, const Tensor& tensor, int half);
  HalfCache(const HalfCache&) = delete;
  HalfCache& operator=(const HalfCache&) = delete;

  const Arg& arg() const { return arg_; }

 private:
  Arg arg_;
  std::array<int64_t, 4> sizes_, strides_;
};

// The keys or the values of a pool.
struct PagedCache {
  int64_t num_pages;
  int64_t page_size;
  int64_t num_heads;
  int64_t head_dim;
  PagedStrides strides;  // elements
};

// kv_layout 0: [num_pages, page_size, num_heads, head_dim]; 1: [num_pages, num_heads, page_size,
// head_dim]. Any strides but a last one of 1.
PagedCache paged_cache(const Arg& cache, int64_t kv_layout);

// A cache without heads, [num_pages, page_size, head_dim]: one head.
PagedCache paged_latent_cache(const Arg& cache);

// Fails unless keys and values, checked as above, have pages, slots and heads alike.
void check_paged_pair(const Arg& k_cache, const PagedCache& k, const Arg& v_cache,
                      const PagedCache& v);

// The index tensors of a batch over pools like `cache`, on the device of `as`; without the lengths
// of last pages where positions say all.
PageTable page_table(const Arg& kv_indices, const Arg& kv_indptr, const PagedCache& cache,
                     const Arg& as);
PageTable page_table(const Arg& kv_indices, const Arg& kv_indptr, const Arg& kv_last_page_len,
                     const PagedCache& cache, const Arg& as);

// A vector of `size` numbers on the device of `as`, int32 or int64.
Indices indices_of(const Arg& arg, int64_t size, const char* meaning, const Arg& as);

// A vector of int32 on the device of `as`; of `size` numbers unless that is -1.
void check_int32_vector(const Arg& arg, int64_t size, const char* meaning, const Arg& as);

}  // namespace ridgeline
