#include "ops/batch_inputs.h"

#include <array>
#include <string>
#include <utility>

namespace ridgeline {
namespace {

constexpr int64_t kTagSizes = 1021;  // a list's length tells that many configurations apart

void check_index(const char* op, const char* name, const MaybeTensor& tensor, const Arg& as,
                 int64_t length, const char* meaning) {
  if (!tensor) return;
  const Arg arg{op, name, *tensor};
  check_same_device(arg, as);
  check_dtype(arg, {Dtype::Int});
  check_rank(arg, {1});
  check_last_stride(arg);
  if (length >= 0) check_shape(arg, std::array{length}, meaning);
}

Cache cache_of(const Arg& k, bool ragged, bool hnd) {
  const int first = ragged ? 0 : 1;
  const int token_dim = first + (hnd ? 1 : 0);
  const int head_dim = first + (hnd ? 0 : 1);
  return {ragged ? 1 : k.sizes[0], k.sizes[token_dim], k.sizes[head_dim],
          ragged ? -1 : 0,         token_dim,          head_dim};
}

void check_cache(const Arg& q, const Arg& k, const Arg& v, int64_t rank, const Device& gpu) {
  check_same_device(k, q);
  check_same_device(v, q);
  check_attention_dtypes(q, k, v, gpu);
  check_rank(q, {3});
  check_rank(k, {rank});
  check_rank(v, {rank});
  for (const Arg* arg : {&q, &k, &v}) {
    check_last_stride(*arg);
    check_aligned16(*arg);
  }
  const int64_t last = rank - 1;
  if (k.sizes[last] != q.sizes[2]) {
    fail(k.op, k.name, "head_dim " + std::to_string(q.sizes[2]) + ", as in 'q'",
         std::to_string(k.sizes[last]), "Pass the keys that belong to these queries");
  }
  for (int64_t dim = 0; dim < last; ++dim) {
    if (k.sizes[dim] != v.sizes[dim]) {
      fail(v.op, v.name, "the leading dimensions of 'k', " + shape_text(k.tensor),
           shape_text(v.tensor), "Pass one value for each key");
    }
  }
}

}  // namespace

KvForm form_of(bool paged, bool ragged, int64_t flags) {
  if (!paged) return ragged ? KvForm::kRagged : KvForm::kPadded;
  return (flags & kLensAreTokens) != 0 ? KvForm::kPagedByLength : KvForm::kPagedByLastPage;
}

void check_length_tensors(const Lengths& of) {
  if (!of.kv_indptr && !of.kv_lens) {
    fail(of.op, "kv_indptr", "kv_indptr (ragged or paged keys) or kv_lens (padded keys)",
         "neither of them", "Pass the tensor that tells where each request's keys are");
  }
}

void check_lengths(Lengths& of, const Arg& as) {
  check_index(of.op, "qo_indptr", of.qo_indptr, as, -1, "");
  if (of.qo_indptr && of.qo_indptr->size(0) < 1) {
    fail(of.op, "qo_indptr", "batch_size + 1 elements", "none", "An empty batch has [0]");
  }
  of.batch_size = of.qo_indptr                 ? of.qo_indptr->size(0) - 1
                  : of.form == KvForm::kSingle ? 1
                                               : of.num_tokens;
  check_index(of.op, "kv_indptr", of.kv_indptr, as, of.batch_size + 1, "[batch_size + 1]");
  check_index(of.op, "kv_lens", of.kv_lens, as, of.batch_size, "[batch_size]");
  if (of.num_qo_heads < 1 || of.num_kv_heads < 1 || of.num_qo_heads % of.num_kv_heads != 0) {
    fail(of.op, "num_qo_heads",
         "a multiple of the " + std::to_string(of.num_kv_heads) + " heads of the keys",
         std::to_string(of.num_qo_heads),
         "Check kv_layout: NHD is [..., tokens, heads, head_dim], HND [..., heads, tokens, "
         "head_dim]");
  }
  for (const auto& [name, value] :
       {std::pair{"head_dim_qk", of.head_dim_qk}, std::pair{"head_dim_vo", of.head_dim_vo}}) {
    if (value % 8 != 0 || value < 8 || value > kMaxHeadDim) {
      fail(of.op, name, "a multiple of 8, at most 256", std::to_string(value),
           "Pad q, k and v with zeros to the next multiple of 8");
    }
  }
  if (of.page_size < 1 || of.page_size > kMaxBatchCount) {
    fail(of.op, "page_size", "at least 1", std::to_string(of.page_size),
         "Pass the tokens that a page holds");
  }
  if (of.max_q_len < -1) {
    fail(of.op, "max_q_len", "at least 0, or -1 where it is not known",
         std::to_string(of.max_q_len), "Leave it out");
  }
  check_window(of.op, of.window_left);
  if (of.num_tokens < 0 || of.num_tokens * of.num_qo_heads > kMaxBatchCount) {
    fail(of.op, "q", "at most 2^30 heads of queries",
         std::to_string(of.num_tokens * of.num_qo_heads), "Split the call");
  }
}

Lengths check_inputs(const Inputs& in, const BatchOptions& options, int64_t max_q_len,
                     Cache& cache) {
  const char* op = in.q.op;
  check_cuda(in.q);
  const bool paged = in.kv_indices.has_value();
  // A list knows where requests begin and end, so with one the rank of the keys alone tells.
  const bool listed = in.schedule && !in.kv_indptr && !in.kv_lens;
  const bool ragged =
      options.single || (!paged && (listed ? in.k.rank() == 3 : in.kv_indptr.has_value()));
  if (options.flags < 0 || options.flags > kAllFlags) {
    fail(op, "flags",
         "a sum of 1 (HND), 2 (causal), 4 (batch_invariant) and 8 (kv_lens of paged "
         "keys are tokens)",
         std::to_string(options.flags), "Call ridgeline.attention");
  }
  check_cache(in.q, in.k, in.v, ragged ? 3 : 4, device(in.q.gpu));
  cache = cache_of(in.k, ragged, options.has(kHnd));
  check_index(op, "kv_indices", in.kv_indices, in.q, -1, "");
  if (paged && !listed && (!in.kv_indptr || !in.kv_lens)) {
    fail(op, in.kv_indptr ? "kv_last_page_len" : "kv_indptr", "a tensor, since kv_indices is one",
         "None", "A page table is kv_indptr, kv_indices and kv_last_page_len (or kv_lens)");
  }
  if (ragged && in.kv_lens) {
    fail(op, "kv_lens", "None for ragged keys (kv_indptr without kv_indices)", "a tensor",
         "Pass kv_indices for paged keys, or leave kv_indptr out for padded ones");
  }
  const int64_t last = in.k.rank() - 1;
  Lengths of = {op,
                in.qo_indptr,
                in.kv_indptr,
                in.kv_lens,
                options.flags,
                paged ? cache.tokens : 1,
                in.q.sizes[0],
                in.q.sizes[1],
                cache.num_heads,
                in.q.sizes[2],
                in.v.sizes[last],
                max_q_len,
                options.window_left,
                options.single ? KvForm::kSingle : form_of(paged, ragged, options.flags),
                options.single ? cache.tokens : 0};
  if (!listed && !options.single) check_length_tensors(of);
  check_lengths(of, in.q);
  if (!paged && !ragged) {
    if (cache.outer != of.batch_size) {
      fail(op, in.k.name, "batch_size " + std::to_string(of.batch_size) + " rows",
           std::to_string(cache.outer), "Padded keys are [batch_size, max_kv_len, ...]");
    }
  }
  if (cache.tokens > kMaxBatchCount || cache.outer > kMaxBatchCount ||
      (paged && in.kv_indices->size(0) > kMaxBatchCount)) {
    fail(op, in.k.name, "at most 2^30 tokens or pages", shape_text(in.k.tensor), "Split the pool");
  }
  return of;
}

int64_t list_config(const Lengths& of, int64_t config) {
  const int64_t page_size = is_paged(of.form) ? of.page_size : 1;
  for (const int64_t value : {of.num_qo_heads, of.num_kv_heads, of.head_dim_qk, of.head_dim_vo,
                              of.flags & (kCausal | kInvariant | kLensAreTokens), page_size}) {
    config = (config * 31 + value) % kTagSizes;
  }
  return config;
}

int64_t list_length(const Lengths& of) {
  const ListLayout layout = list_layout(of.batch_size, of.num_tokens, of.group_size(),
                                        of.num_kv_heads, (of.flags & kInvariant) != 0);
  return layout.num_words + list_config(of, 0);
}

void check_list(const Arg& list, int64_t length, const Arg& as) {
  check_same_device(list, as);
  check_dtype(list, {Dtype::Int});
  check_rank(list, {1});
  check_last_stride(list);
  check_aligned16(list);
  check_shape(list, std::array{length},
              "the work list of these shapes, heads, mask and page size; make one with "
              "ridgeline.schedule and the arguments of this call");
}

}  // namespace ridgeline
