#include "runtime/paged_cache.h"

#include <algorithm>
#include <array>

namespace ridgeline {
namespace {

PagedCache counted(const Arg& arg, const PagedCache& cache) {
  if (cache.page_size == 0) {
    fail(arg.op, arg.name, "pages of at least 1 token",
         "page_size 0 (shape " + shape_text(arg.tensor) + ")",
         "Make the pool with a page_size of 1 or more");
  }
  if (cache.num_pages > kMaxCount || cache.page_size > kMaxCount) {
    fail(arg.op, arg.name, "fewer than 2^31 pages, and tokens in each", shape_text(arg.tensor),
         "Page numbers are int32");
  }
  return cache;
}

}  // namespace

HalfCache::HalfCache(const char* op, const char* name, const Tensor& tensor, int half)
    : arg_(op, name, tensor) {
  if (arg_.rank() != 5) return;
  if (arg_.sizes[1] != 2) {
    fail(op, name, "a (k, v) tuple, or one tensor [num_pages, 2, ...] of 5 dimensions",
         "shape " + shape_text(tensor), "Pass the keys and the values as a tuple");
  }
  for (size_t dim = 0; dim < 4; ++dim) {
    sizes_[dim] = arg_.sizes[dim == 0 ? 0 : dim + 1];
    strides_[dim] = arg_.strides[dim == 0 ? 0 : dim + 1];
  }
  const int64_t begin = half * arg_.strides[1] * arg_.element_size();
  arg_.data = static_cast<const char*>(arg_.data) + (arg_.numel() > 0 ? begin : 0);
  arg_.sizes = sizes_;
  arg_.strides = strides_;
}

PagedCache paged_cache(const Arg& arg, int64_t kv_layout) {
  if (kv_layout != 0 && kv_layout != 1) {
    fail(arg.op, "kv_layout", "0 (NHD) or 1 (HND)", std::to_string(kv_layout), "Pass one of these");
  }
  check_rank(arg, {4});
  check_last_stride(arg);
  const size_t token_dim = kv_layout == 0 ? 1 : 2, head_dim = 3 - token_dim;
  return counted(arg, {arg.sizes[0],
                       arg.sizes[token_dim],
                       arg.sizes[head_dim],
                       arg.sizes[3],
                       {arg.strides[0], arg.strides[token_dim], arg.strides[head_dim]}});
}

PagedCache paged_latent_cache(const Arg& arg) {
  check_rank(arg, {3});
  check_last_stride(arg);
  return counted(
      arg, {arg.sizes[0], arg.sizes[1], 1, arg.sizes[2], {arg.strides[0], arg.strides[1], 0}});
}

void check_paged_pair(const Arg& k_cache, const PagedCache& k, const Arg& v_cache,
                      const PagedCache& v) {
  check_same_device(v_cache, k_cache);
  check_same_dtype(v_cache, k_cache);
  if (k.num_pages == v.num_pages && k.page_size == v.page_size && k.num_heads == v.num_heads) {
    return;
  }
  fail(v_cache.op, v_cache.name,
       std::string("the shape of '") + k_cache.name + "', " + shape_text(k_cache.tensor) +
           ", but for the last dimension",
       shape_text(v_cache.tensor), "Keys and values of a token have the same page, slot and head");
}

void check_int32_vector(const Arg& arg, int64_t size, const char* meaning, const Arg& as) {
  check_same_device(arg, as);
  check_dtype(arg, {Dtype::Int});
  check_rank(arg, {1});
  if (size >= 0) check_shape(arg, std::array{size}, meaning);
  check_last_stride(arg);
}

Indices indices_of(const Arg& arg, int64_t size, const char* meaning, const Arg& as) {
  check_same_device(arg, as);
  check_dtype(arg, {Dtype::Int, Dtype::Long});
  check_rank(arg, {1});
  check_shape(arg, std::array{size}, meaning);
  check_last_stride(arg);
  return {arg.data, arg.dtype == Dtype::Long};
}

PageTable page_table(const Arg& kv_indices, const Arg& kv_indptr, const PagedCache& cache,
                     const Arg& as) {
  check_int32_vector(kv_indices, -1, "", as);
  check_int32_vector(kv_indptr, -1, "", as);
  const int64_t batch_size = kv_indptr.sizes[0] - 1;
  if (batch_size < 0 || batch_size > kMaxCount) {
    fail(kv_indptr.op, kv_indptr.name, "shape [batch_size + 1]", shape_text(kv_indptr.tensor),
         "An empty batch has one number, 0");
  }
  return {static_cast<const int32*>(kv_indices.data),
          static_cast<const int32*>(kv_indptr.data),
          static_cast<uint32>(std::min(kv_indices.sizes[0], kMaxCount)),
          static_cast<uint32>(batch_size),
          static_cast<uint32>(cache.num_pages),
          make_divider(static_cast<uint32>(cache.page_size))};
}

PageTable page_table(const Arg& kv_indices, const Arg& kv_indptr, const Arg& kv_last_page_len,
                     const PagedCache& cache, const Arg& as) {
  const PageTable table = page_table(kv_indices, kv_indptr, cache, as);
  check_int32_vector(kv_last_page_len, table.batch_size, "[batch_size]", as);
  return table;
}

}  // namespace ridgeline
