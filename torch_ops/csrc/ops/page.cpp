// append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens:
// schemas, checks, choice of kernel, launch. copy_pages is in page_copy.cpp.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/cache_cast.h"
#include "page/params.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"
#include "runtime/paged_cache.h"
#include "runtime/vector_width.h"

namespace ridgeline {
namespace {

constexpr const char* kAppend = "page/append_paged_kv_cache.cuh:append_paged_kv_cache";
constexpr const char* kBatchIndices =
    "page/get_batch_indices_positions.cuh:get_batch_indices_positions";
constexpr const char* kSeqLens = "page/get_seq_lens.cuh:get_seq_lens";

int wide_elements(Dtype from) {
  return from == Dtype::Float ? 4 : 8;  // 16 bytes
}

std::string copy_name(int num_bytes) {
  return kernel_name(kAppend, kernel_name("Copy", num_bytes));
}

std::string convert_name(const Conversion& types, int vec_size) {
  return kernel_name(
      kAppend, kernel_name("Convert", device_type(types.from), device_type(types.to), vec_size));
}

Kernel& copy_kernel(int num_bytes) {
  static const VectorKernels kernels(copy_name);
  return kernels.of(num_bytes);
}

Kernel& convert_kernel(size_t conversion, bool wide) {
  static const auto kernels = [] {
    std::array<std::array<Kernel*, 2>, kConversions.size()> all;
    for (size_t i = 0; i < kConversions.size(); ++i) {
      const Conversion& types = kConversions[i];
      all[i] = {&kernel(convert_name(types, 1)),
                &kernel(convert_name(types, wide_elements(types.from)))};
    }
    return all;
  }();
  return *kernels[conversion][wide];
}

std::vector<Row> page_rows() {
  std::vector<Row> rows;
  const auto add = [&](const char* op, const std::string& name, const char* why) {
    rows.push_back({.op = op, .kernel = name, .block = kPageThreads, .why = why});
  };
  for (const char* op : {"append_paged_kv_cache", "append_paged_mla_kv_cache"}) {
    add_vector_rows(rows, op, copy_name, kPageThreads);
    for (const Conversion& types : kConversions) {
      add(op, convert_name(types, wide_elements(types.from)), "a cache of lower precision");
      add(op, convert_name(types, 1), "the same, for views that are not multiples of 16 bytes");
    }
  }
  add("get_batch_indices_positions", kBatchIndices, "one thread a token");
  add("get_seq_lens", kSeqLens, "one thread a request");
  return rows;
}

Choice page_choose(const std::string& op, const Config& config, int) {
  if (op == "get_batch_indices_positions") return {{kBatchIndices}, {}};
  if (op == "get_seq_lens") return {{kSeqLens}, {}};
  const std::string dtype = "torch." + config.get("dtype", "float16");
  const std::string kv_dtype = "torch." + config.get("kv_dtype", config.get("dtype", "float16"));
  if (dtype == kv_dtype) return {{copy_name(kVectorBytes)}, {}};
  for (const Conversion& types : kConversions) {
    if (dtype == dtype_name(types.from) && kv_dtype == dtype_name(types.to)) {
      return {{convert_name(types, wide_elements(types.from))}, {}};
    }
  }
  return {{},
          {"dtype " + dtype + " into kv_dtype " + kv_dtype +
           ": expected the same, or float16, bfloat16 or float32 into a lower precision"}};
}

const RegisterFamily family({{"append_paged_kv_cache", "append_paged_mla_kv_cache",
                              "get_batch_indices_positions", "get_seq_lens"},
                             page_rows,
                             page_choose});

struct Batch {
  const Tensor& batch_indices;
  const Tensor& positions;
  const Tensor& kv_indices;
  const Tensor& kv_indptr;
  const Tensor& kv_last_page_len;
};

AppendTensor append_tensor(const Side& side, int64_t unit, int vec_size, bool converts) {
  const PagedCache& cache = side.cache;
  const int64_t vecs_per_head = cache.head_dim * unit / vec_size;
  const int64_t num_vecs = cache.num_heads * vecs_per_head;
  if (num_vecs > kMaxCount) {
    fail(side.source.op, side.source.name, "fewer than 2^31 bytes for each token",
         shape_text(side.source.tensor), "Split the call");
  }
  return {cache_side(side, unit, converts), static_cast<uint32>(num_vecs),
          page_team(static_cast<uint32>(num_vecs)),
          make_divider(static_cast<uint32>(std::max<int64_t>(vecs_per_head, 1)))};
}

void append(const std::array<Side, 2>& sides, const Batch& batch) {
  const Side& k = sides[0];
  const Side& v = sides[1];
  const char* op = k.target.op;
  check_cuda(k.target);
  check_paged_pair(k.target, k.cache, v.target, v.cache);
  const int64_t nnz = batch.positions.dim() == 1 ? batch.positions.size(0) : 0;
  const Indices positions = indices_of({op, "positions", batch.positions}, nnz, "[nnz]", k.target);
  const Indices batch_indices = indices_of({op, "batch_indices", batch.batch_indices}, nnz,
                                           "[nnz], as 'positions'", k.target);
  const PageTable table =
      page_table({op, "kv_indices", batch.kv_indices}, {op, "kv_indptr", batch.kv_indptr},
                 {op, "kv_last_page_len", batch.kv_last_page_len}, k.cache, k.target);
  check_source(k, nnz);
  check_source(v, nnz);
  check_same_dtype(v.source, k.source);
  check_distinct(v.target, k.target);
  if (nnz > kMaxCount) {
    fail(op, k.source.name, "fewer than 2^31 tokens", std::to_string(nnz), "Split the call");
  }

  const std::optional<size_t> conversion = conversion_of(k);
  VectorWidth source_width, target_width;
  for (const Side& side : sides) {
    source_width.add(side.source.tensor, side.cache.head_dim);
    target_width.add(side.target.tensor, side.cache.head_dim);
  }
  int64_t unit = 1;
  int vec_size;
  if (conversion) {
    vec_size = wide_elements(k.source.dtype);
    const int target_bytes = vec_size * static_cast<int>(k.target.tensor.element_size());
    if (source_width.bytes() < 16 || target_width.bytes() < std::min(target_bytes, 16)) {
      vec_size = 1;
    }
  } else {
    unit = static_cast<int64_t>(k.target.tensor.element_size());
    vec_size = std::min(source_width.bytes(), target_width.bytes());
  }
  const AppendParams params{{append_tensor(k, unit, vec_size, conversion.has_value()),
                             append_tensor(v, unit, vec_size, conversion.has_value())},
                            batch_indices,
                            positions,
                            static_cast<uint32>(nnz),
                            table};
  if (nnz == 0 || table.batch_size == 0 || table.num_pages == 0) return;
  const uint32 team = std::max(params.tensors[0].team_size, params.tensors[1].team_size);
  const uint32 tokens_per_block = kPageThreads / team;
  launch(conversion ? convert_kernel(*conversion, vec_size > 1) : copy_kernel(vec_size),
         device(k.target.tensor.get_device_index()),
         {.grid_x = (params.num_tokens + tokens_per_block - 1) / tokens_per_block,
          .grid_y = 2,
          .block = kPageThreads},
         &params);
}

void append_paged_kv_cache(const Tensor& append_key, const Tensor& append_value,
                           const Tensor& batch_indices, const Tensor& positions,
                           const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_indices,
                           const Tensor& kv_indptr, const Tensor& kv_last_page_len,
                           int64_t kv_layout, double k_scale, double v_scale,
                           const std::optional<Tensor>& k_scales,
                           const std::optional<Tensor>& v_scales) {
  constexpr const char* kOp = "append_paged_kv_cache";
  const Arg k{kOp, "k_cache", k_cache}, v{kOp, "v_cache", v_cache};
  append({Side{{kOp, "append_key", append_key},
               k,
               paged_cache(k, kv_layout),
               {"k_scale", k_scale, k_scales}},
          Side{{kOp, "append_value", append_value},
               v,
               paged_cache(v, kv_layout),
               {"v_scale", v_scale, v_scales}}},
         {batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len});
}

void append_paged_mla_kv_cache(const Tensor& append_ckv, const Tensor& append_kpe,
                               const Tensor& batch_indices, const Tensor& positions,
                               const Tensor& ckv_cache, const Tensor& kpe_cache,
                               const Tensor& kv_indices, const Tensor& kv_indptr,
                               const Tensor& kv_last_page_len, double ckv_scale, double kpe_scale) {
  constexpr const char* kOp = "append_paged_mla_kv_cache";
  const std::optional<Tensor> none;
  const Arg ckv{kOp, "ckv_cache", ckv_cache}, kpe{kOp, "kpe_cache", kpe_cache};
  append({Side{{kOp, "append_ckv", append_ckv},
               ckv,
               paged_latent_cache(ckv),
               {"ckv_scale", ckv_scale, none}},
          Side{{kOp, "append_kpe", append_kpe},
               kpe,
               paged_latent_cache(kpe),
               {"kpe_scale", kpe_scale, none}}},
         {batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len});
}

uint32 blocks_for(int64_t num_threads) {
  return static_cast<uint32>((num_threads + kPageThreads - 1) / kPageThreads);
}

// Of an indptr: the requests of the batch.
int64_t batch_size_of(const Arg& indptr) {
  check_cuda(indptr);
  check_int32_vector(indptr, -1, "", indptr);
  const int64_t batch_size = indptr.tensor.size(0) - 1;
  if (batch_size < 0 || batch_size > kMaxCount) {
    fail(indptr.op, indptr.name, "shape [batch_size + 1]", shape_text(indptr.tensor),
         "An empty batch has one number, 0");
  }
  return batch_size;
}

std::tuple<Tensor, Tensor> get_batch_indices_positions(const Tensor& append_indptr,
                                                       const Tensor& seq_lens, int64_t nnz) {
  constexpr const char* kOp = "get_batch_indices_positions";
  static Kernel& kernel_of_op = kernel(kBatchIndices);
  const Arg indptr{kOp, "append_indptr", append_indptr};
  const int64_t batch_size = batch_size_of(indptr);
  check_int32_vector({kOp, "seq_lens", seq_lens}, batch_size, "[batch_size]", indptr);
  if (nnz < 0 || nnz > kMaxCount) {
    fail(kOp, "nnz", "a number of tokens from 0 to 2^31 - 1", std::to_string(nnz),
         "It is the number of rows to append");
  }
  const Tensor batch_indices = empty(append_indptr, {nnz}, Dtype::Int);
  const Tensor positions = empty(append_indptr, {nnz}, Dtype::Int);
  const BatchIndicesParams params{static_cast<const int32*>(append_indptr.const_data_ptr()),
                                  static_cast<const int32*>(seq_lens.const_data_ptr()),
                                  static_cast<int32*>(batch_indices.mutable_data_ptr()),
                                  static_cast<int32*>(positions.mutable_data_ptr()),
                                  static_cast<uint32>(batch_size),
                                  static_cast<uint32>(nnz)};
  launch(kernel_of_op, device(append_indptr.get_device_index()),
         {.grid_x = blocks_for(nnz), .block = kPageThreads}, &params);
  return {batch_indices, positions};
}

Tensor get_seq_lens(const Tensor& kv_indptr, const Tensor& kv_last_page_len, int64_t page_size) {
  constexpr const char* kOp = "get_seq_lens";
  static Kernel& kernel_of_op = kernel(kSeqLens);
  const Arg indptr{kOp, "kv_indptr", kv_indptr};
  const int64_t batch_size = batch_size_of(indptr);
  check_int32_vector({kOp, "kv_last_page_len", kv_last_page_len}, batch_size, "[batch_size]",
                     indptr);
  if (page_size < 1 || page_size > kMaxCount) {
    fail(kOp, "page_size", "a number of tokens from 1 to 2^31 - 1", std::to_string(page_size),
         "Pass the page_size of the cache");
  }
  const Tensor seq_lens = empty(kv_indptr, {batch_size}, Dtype::Int);
  const SeqLensParams params{static_cast<const int32*>(kv_indptr.const_data_ptr()),
                             static_cast<const int32*>(kv_last_page_len.const_data_ptr()),
                             static_cast<int32*>(seq_lens.mutable_data_ptr()),
                             static_cast<uint32>(batch_size), static_cast<uint32>(page_size)};
  launch(kernel_of_op, device(kv_indptr.get_device_index()),
         {.grid_x = blocks_for(batch_size), .block = kPageThreads}, &params);
  return seq_lens;
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "append_paged_kv_cache(Tensor append_key, Tensor append_value, Tensor batch_indices, "
      "Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_indices, "
      "Tensor kv_indptr, Tensor kv_last_page_len, int kv_layout=0, float k_scale=1.0, "
      "float v_scale=1.0, Tensor? k_scales=None, Tensor? v_scales=None) -> ()");
  m.def(
      "append_paged_mla_kv_cache(Tensor append_ckv, Tensor append_kpe, Tensor batch_indices, "
      "Tensor positions, Tensor(a!) ckv_cache, Tensor(b!) kpe_cache, Tensor kv_indices, "
      "Tensor kv_indptr, Tensor kv_last_page_len, float ckv_scale=1.0, float kpe_scale=1.0) -> ()");
  m.def(
      "get_batch_indices_positions(Tensor append_indptr, Tensor seq_lens, SymInt nnz) "
      "-> (Tensor, Tensor)");
  m.def("get_seq_lens(Tensor kv_indptr, Tensor kv_last_page_len, SymInt page_size) -> Tensor");
}

static void kernels(Library& m) {
  m.impl("append_paged_kv_cache", TORCH_BOX(&append_paged_kv_cache));
  m.impl("append_paged_mla_kv_cache", TORCH_BOX(&append_paged_mla_kv_cache));
  m.impl("get_batch_indices_positions", TORCH_BOX(&get_batch_indices_positions));
  m.impl("get_seq_lens", TORCH_BOX(&get_seq_lens));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
