// apply_rope, apply_rope_pos_ids, apply_llama31_rope, apply_llama31_rope_pos_ids and
// apply_rope_with_cos_sin_cache, in place or not: schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/rope_angles.h"
#include "rope/params.h"
#include "runtime/access.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"
#include "runtime/paged_cache.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxRotaryDim = 2 * kRopeMaxPairs;
constexpr const char* kRope = "rope/apply_rope.cuh:apply_rope";
constexpr std::array kPairings = {"HalfSplit", "Interleaved"};

// The policies of the kernel, as its name spells them.
template <class Positions, class Angles>
struct Source;
template <>
struct Source<PosIds, Frequencies> {
  static constexpr const char* kPositions = "PosIds";
  static constexpr const char* kAngles = "Frequencies";
};
template <>
struct Source<RequestOffsets, Frequencies> {
  static constexpr const char* kPositions = "RequestOffsets";
  static constexpr const char* kAngles = "Frequencies";
};
template <>
struct Source<PosIds, CosSinCache> {
  static constexpr const char* kPositions = "PosIds";
  static constexpr const char* kAngles = "CosSinCache";
};

template <class Of>
auto rope_name(bool interleave) {
  return [=](const Access& access) {
    return kernel_name(kRope, device_type(access.dtype), access.vec_size, kPairings[interleave],
                       Of::kPositions, Of::kAngles);
  };
}

template <class Of>
Kernel& rope_kernel(Dtype dtype, int vec_size, bool interleave) {
  static const std::array kernels = {AccessKernels(rope_name<Of>(false)),
                                     AccessKernels(rope_name<Of>(true))};
  return kernels[interleave].of(dtype, vec_size);
}

using ByPosIds = Source<PosIds, Frequencies>;
using ByRequest = Source<RequestOffsets, Frequencies>;
using ByCache = Source<PosIds, CosSinCache>;

template <class Of>
void add_rope_rows(std::vector<Row>& rows, const char* op) {
  for (const bool interleave : {false, true}) {
    add_access_rows(rows, op, rope_name<Of>(interleave), kRopeWarps * 32);
  }
}

std::vector<Row> rope_rows() {
  std::vector<Row> rows;
  add_rope_rows<ByRequest>(rows, "apply_rope");
  add_rope_rows<ByPosIds>(rows, "apply_rope_pos_ids");
  add_rope_rows<ByCache>(rows, "apply_rope_with_cos_sin_cache");
  return rows;
}

Choice rope_choose(const std::string& op, const Config& config, int) {
  const bool interleave = config.get_int("interleave", 0) != 0;
  if (op.find("pos_ids") != std::string::npos) {
    return choose_access(config, rope_name<ByPosIds>(interleave));
  }
  if (op.find("cache") != std::string::npos) {
    return choose_access(config, rope_name<ByCache>(interleave));
  }
  return choose_access(config, rope_name<ByRequest>(interleave));
}

const RegisterFamily family({{"apply_rope", "apply_rope_inplace", "apply_rope_pos_ids",
                              "apply_rope_pos_ids_inplace", "apply_llama31_rope",
                              "apply_llama31_rope_inplace", "apply_llama31_rope_pos_ids",
                              "apply_llama31_rope_pos_ids_inplace", "apply_rope_with_cos_sin_cache",
                              "apply_rope_with_cos_sin_cache_inplace"},
                             rope_rows,
                             rope_choose});

// Queries or keys: [nnz, num_heads, head_dim], or [nnz, num_heads * head_dim] where head_dim is
// known otherwise.
struct Heads {
  Arg arg;
  int64_t num_heads;
  int64_t head_dim;
  int64_t head_stride;  // elements; in a new tensor it is head_dim

  explicit Heads(const Arg& x)
      : arg(x), num_heads(x.sizes[1]), head_dim(x.sizes[2]), head_stride(x.strides[1]) {}
  Heads(const Arg& x, int64_t head_size)
      : arg(x),
        num_heads(x.rank() == 3 ? x.sizes[1] : x.sizes[1] / head_size),
        head_dim(head_size),
        head_stride(x.rank() == 3 ? x.strides[1] : head_size) {}
};

struct Rotation {
  Heads q;
  Heads k;
  int64_t rotary_dim;
  bool interleave;

  int64_t nnz() const { return q.arg.sizes[0]; }
};

void check_type(const Arg& q, const Arg& k) {
  check_cuda(q);
  check_dtype(q, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_same_device(k, q);
  check_same_dtype(k, q);
}

void check_tokens(const Arg& q) {
  if (q.sizes[0] <= kMaxCount) return;
  fail(q.op, q.name, "fewer than 2^31 tokens", std::to_string(q.sizes[0]), "Split the call");
}

// A rotary_dim of -1 means whole heads.
Rotation rotation_of(const Arg& q, const Arg& k, int64_t rotary_dim, bool interleave) {
  check_type(q, k);
  check_rank(q, {3});
  check_last_stride(q);
  check_rank(k, {3});
  check_shape(k, std::array{q.sizes[0], k.sizes[1], q.sizes[2]},
              "[nnz, num_k_heads, head_dim], as q's");
  check_last_stride(k);
  check_tokens(q);
  if (rotary_dim == -1) rotary_dim = q.sizes[2];
  check_rotary_dim(q.op, rotary_dim, q.sizes[2], kMaxRotaryDim);
  return {Heads(q), Heads(k), rotary_dim, interleave};
}

Heads heads_of(const Arg& x, int64_t nnz, int64_t head_size) {
  check_rank(x, {2, 3});
  if (x.rank() == 3) {
    check_shape(x, std::array{nnz, x.sizes[1], head_size}, "[nnz, num_heads, head_size]");
  } else {
    const int64_t num_heads = x.sizes[1] / head_size;
    check_shape(x, std::array{nnz, num_heads * head_size}, "[nnz, num_heads * head_size]");
  }
  check_last_stride(x);
  return {x, head_size};
}

// Where the results go: two new tensors, or q and k themselves.
struct Outputs {
  void* q;
  void* k;
  bool in_place;
};

template <class Positions, class Angles>
void rotate(const Rotation& rotation, const Outputs& outputs, const Positions& positions,
            const auto& set_angles) {
  const auto& [q, k, rotary_dim, interleave] = rotation;
  const auto& [q_out, k_out, in_place] = outputs;
  const int64_t nnz = rotation.nnz(), num_heads = q.num_heads + k.num_heads;
  if (nnz == 0 || num_heads == 0) return;
  // New tensors are aligned like whole heads.
  const int vec_size = access_width({&q.arg, &k.arg}, {rotary_dim / 2, q.head_dim});
  const int64_t num_copied = in_place ? 0 : q.head_dim - rotary_dim;
  const auto num_pairs = static_cast<uint32>(rotary_dim / 2);
  const RopePlan plan =
      rope_plan(static_cast<uint32>(num_heads), num_pairs, static_cast<uint32>(nnz), vec_size);
  const int64_t num_warps = nnz * plan.num_slices;
  if (num_warps > kMaxCount) {
    fail(q.arg.op, q.arg.name, "fewer than 2^31 slices of heads", std::to_string(num_warps),
         "Split the call");
  }
  const auto tensor = [&](const Heads& heads, void* output) -> RopeTensor {
    return {
        .input = heads.arg.data,
        .output = output,
        .input_token_stride = heads.arg.strides[0],
        .input_head_stride = heads.head_stride,
        .output_token_stride = in_place ? heads.arg.strides[0] : heads.num_heads * heads.head_dim,
        .output_head_stride = in_place ? heads.head_stride : heads.head_dim};
  };

  RopeParams<Positions, Angles> params;
  params.q = tensor(q, q_out);
  params.k = tensor(k, k_out);
  params.shape = {.nnz = static_cast<uint32>(nnz),
                  .num_q_heads = static_cast<uint32>(q.num_heads),
                  .num_heads = static_cast<uint32>(num_heads),
                  .num_pairs = num_pairs,
                  .num_copied_vecs = static_cast<uint32>(num_copied / vec_size),
                  .team_size = plan.team_size,
                  .heads_per_slice = plan.heads_per_slice,
                  .num_slices = make_divider(plan.num_slices),
                  .num_units = make_divider(num_pairs / static_cast<uint32>(vec_size))};
  params.positions = positions;
  set_angles(params.angles);
  const auto blocks = static_cast<unsigned>((num_warps + kRopeWarps - 1) / kRopeWarps);
  launch(rope_kernel<Source<Positions, Angles>>(q.arg.dtype, vec_size, interleave),
         device(q.arg.gpu), {.grid_x = blocks, .block = kRopeWarps * 32}, &params);
}

void check_in_place(const Rotation& rotation) {
  check_writable(rotation.q.arg);
  check_writable(rotation.k.arg);
  check_distinct(rotation.k.arg, rotation.q.arg);
}

// Both forms of every op.
std::tuple<Tensor, Tensor> fresh(const Rotation& rotation, const auto& run) {
  std::tuple<Tensor, Tensor> outputs{empty_like(rotation.q.arg), empty_like(rotation.k.arg)};
  run({std::get<0>(outputs).mutable_data_ptr(), std::get<1>(outputs).mutable_data_ptr(), false});
  return outputs;
}

void in_place(const Rotation& rotation, const auto& run) {
  check_in_place(rotation);
  run({rotation.q.arg.tensor.mutable_data_ptr(), rotation.k.arg.tensor.mutable_data_ptr(), true});
}

auto by_pos_ids(const Rotation& rotation, const Tensor& pos_ids, const AngleOptions& options) {
  const Arg& q = rotation.q.arg;
  const PosIds positions{indices_of({q.op, "pos_ids", pos_ids}, rotation.nnz(), "[nnz]", q)};
  check_angles(q.op, options);
  return [=, &rotation](const Outputs& outputs) {
    rotate<PosIds, Frequencies>(rotation, outputs, positions, [&](Frequencies& angles) {
      fill_frequencies(angles, static_cast<uint32>(rotation.rotary_dim / 2), options);
    });
  };
}

auto by_request(const Rotation& rotation, const Tensor& indptr, const Tensor& offsets,
                const AngleOptions& options) {
  const Arg& q = rotation.q.arg;
  const Arg indptr_arg{q.op, "indptr", indptr};
  check_int32_vector(indptr_arg, -1, "", q);
  const int64_t batch_size = indptr_arg.sizes[0] - 1;
  if (batch_size < 0 || batch_size >= kMaxCount) {
    fail(q.op, "indptr", "shape [batch_size + 1]", shape_text(indptr),
         "An empty batch has one number, 0");
  }
  const RequestOffsets positions{
      static_cast<const int32*>(indptr.const_data_ptr()),
      indices_of({q.op, "offsets", offsets}, batch_size, "[batch_size]", q),
      static_cast<uint32>(batch_size)};
  check_angles(q.op, options);
  return [=, &rotation](const Outputs& outputs) {
    rotate<RequestOffsets, Frequencies>(rotation, outputs, positions, [&](Frequencies& angles) {
      fill_frequencies(angles, static_cast<uint32>(rotation.rotary_dim / 2), options);
    });
  };
}

std::tuple<Tensor, Tensor> apply_rope_pos_ids(const Tensor& q, const Tensor& k,
                                              const Tensor& pos_ids, double rope_theta,
                                              int64_t rotary_dim, bool interleave,
                                              double rope_scale) {
  constexpr const char* kOp = "apply_rope_pos_ids";
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  return fresh(rotation, by_pos_ids(rotation, pos_ids, {rope_scale, rope_theta}));
}

void apply_rope_pos_ids_inplace(const Tensor& q, const Tensor& k, const Tensor& pos_ids,
                                double rope_theta, int64_t rotary_dim, bool interleave,
                                double rope_scale) {
  constexpr const char* kOp = "apply_rope_pos_ids_inplace";
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  in_place(rotation, by_pos_ids(rotation, pos_ids, {rope_scale, rope_theta}));
}

std::tuple<Tensor, Tensor> apply_llama31_rope_pos_ids(const Tensor& q, const Tensor& k,
                                                      const Tensor& pos_ids, double rope_theta,
                                                      int64_t rotary_dim, bool interleave,
                                                      double rope_scale, double low_freq_factor,
                                                      double high_freq_factor,
                                                      double old_context_len) {
  constexpr const char* kOp = "apply_llama31_rope_pos_ids";
  const Llama31Scaling scaling{low_freq_factor, high_freq_factor, old_context_len};
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  return fresh(rotation, by_pos_ids(rotation, pos_ids, {rope_scale, rope_theta, scaling}));
}

void apply_llama31_rope_pos_ids_inplace(const Tensor& q, const Tensor& k, const Tensor& pos_ids,
                                        double rope_theta, int64_t rotary_dim, bool interleave,
                                        double rope_scale, double low_freq_factor,
                                        double high_freq_factor, double old_context_len) {
  constexpr const char* kOp = "apply_llama31_rope_pos_ids_inplace";
  const Llama31Scaling scaling{low_freq_factor, high_freq_factor, old_context_len};
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  in_place(rotation, by_pos_ids(rotation, pos_ids, {rope_scale, rope_theta, scaling}));
}

std::tuple<Tensor, Tensor> apply_rope(const Tensor& q, const Tensor& k, const Tensor& indptr,
                                      const Tensor& offsets, double rope_theta, int64_t rotary_dim,
                                      bool interleave, double rope_scale) {
  constexpr const char* kOp = "apply_rope";
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  return fresh(rotation, by_request(rotation, indptr, offsets, {rope_scale, rope_theta}));
}

void apply_rope_inplace(const Tensor& q, const Tensor& k, const Tensor& indptr,
                        const Tensor& offsets, double rope_theta, int64_t rotary_dim,
                        bool interleave, double rope_scale) {
  constexpr const char* kOp = "apply_rope_inplace";
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  in_place(rotation, by_request(rotation, indptr, offsets, {rope_scale, rope_theta}));
}

std::tuple<Tensor, Tensor> apply_llama31_rope(const Tensor& q, const Tensor& k,
                                              const Tensor& indptr, const Tensor& offsets,
                                              double rope_theta, int64_t rotary_dim,
                                              bool interleave, double rope_scale,
                                              double low_freq_factor, double high_freq_factor,
                                              double old_context_len) {
  constexpr const char* kOp = "apply_llama31_rope";
  const Llama31Scaling scaling{low_freq_factor, high_freq_factor, old_context_len};
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  return fresh(rotation, by_request(rotation, indptr, offsets, {rope_scale, rope_theta, scaling}));
}

void apply_llama31_rope_inplace(const Tensor& q, const Tensor& k, const Tensor& indptr,
                                const Tensor& offsets, double rope_theta, int64_t rotary_dim,
                                bool interleave, double rope_scale, double low_freq_factor,
                                double high_freq_factor, double old_context_len) {
  constexpr const char* kOp = "apply_llama31_rope_inplace";
  const Llama31Scaling scaling{low_freq_factor, high_freq_factor, old_context_len};
  const Rotation rotation = rotation_of({kOp, "q", q}, {kOp, "k", k}, rotary_dim, interleave);
  in_place(rotation, by_request(rotation, indptr, offsets, {rope_scale, rope_theta, scaling}));
}

// The arguments of the ops with a table, checked.
struct ByTable {
  Rotation rotation;
  PosIds positions;
  CosSinCache table;

  void operator()(const Outputs& outputs) const {
    rotate<PosIds, CosSinCache>(rotation, outputs, positions,
                                [&](CosSinCache& angles) { angles = table; });
  }
};

ByTable by_table(const char* op, const Tensor& positions, const Tensor& query, const Tensor& key,
                 int64_t head_size, const Tensor& cos_sin_cache, bool is_neox) {
  const Arg q{op, "query", query}, k{op, "key", key}, cache{op, "cos_sin_cache", cos_sin_cache};
  check_type(q, k);
  if (head_size < 1) {
    fail(op, "head_size", "at least 1", std::to_string(head_size), "It is the length of one head");
  }
  check_rank(q, {2, 3});
  const int64_t nnz = q.sizes[0];
  const Heads q_heads = heads_of(q, nnz, head_size), k_heads = heads_of(k, nnz, head_size);
  check_tokens(q);
  const CosSinCache table = cos_sin_cache_of(cache, q, nnz);
  const int64_t rotary_dim = cache.sizes[1];
  if (rotary_dim % 2 != 0 || rotary_dim < 2 || rotary_dim > std::min(head_size, kMaxRotaryDim)) {
    fail(op, cache.name,
         "shape [max_position, rotary_dim] with an even rotary_dim from 2 to head_size (" +
             std::to_string(head_size) + ") and at most " + std::to_string(kMaxRotaryDim),
         shape_text(cos_sin_cache), "A row is rotary_dim / 2 cosines, then as many sines");
  }
  return {{q_heads, k_heads, rotary_dim, !is_neox},
          {indices_of({op, "positions", positions}, nnz, "[nnz]", q)},
          table};
}

std::tuple<Tensor, Tensor> apply_rope_with_cos_sin_cache(const Tensor& positions,
                                                         const Tensor& query, const Tensor& key,
                                                         int64_t head_size,
                                                         const Tensor& cos_sin_cache,
                                                         bool is_neox) {
  const ByTable run = by_table("apply_rope_with_cos_sin_cache", positions, query, key, head_size,
                               cos_sin_cache, is_neox);
  return fresh(run.rotation, run);
}

void apply_rope_with_cos_sin_cache_inplace(const Tensor& positions, const Tensor& query,
                                           const Tensor& key, int64_t head_size,
                                           const Tensor& cos_sin_cache, bool is_neox) {
  const ByTable run = by_table("apply_rope_with_cos_sin_cache_inplace", positions, query, key,
                               head_size, cos_sin_cache, is_neox);
  in_place(run.rotation, run);
}

}  // namespace

static void schemas(Library& m) {
  // The options that callers set most come first: those that are left out cost next to nothing.
  const auto define = [&](const std::string& name, const std::string& sources, const char* theta,
                          const std::string& scaling) {
    const std::string rest = sources + "float rope_theta=" + theta +
                             ", SymInt rotary_dim=-1, bool interleave=False, " + scaling;
    m.def((name + "(Tensor q, Tensor k, " + rest + ") -> (Tensor, Tensor)").c_str());
    m.def((name + "_inplace(Tensor(a!) q, Tensor(b!) k, " + rest + ") -> ()").c_str());
  };
  const std::string plain = "float rope_scale=1.";
  const std::string llama31 =
      "float rope_scale=8., float low_freq_factor=1., float high_freq_factor=4., "
      "float old_context_len=8192.";
  define("apply_rope", "Tensor indptr, Tensor offsets, ", "10000.", plain);
  define("apply_rope_pos_ids", "Tensor pos_ids, ", "10000.", plain);
  define("apply_llama31_rope", "Tensor indptr, Tensor offsets, ", "500000.", llama31);
  define("apply_llama31_rope_pos_ids", "Tensor pos_ids, ", "500000.", llama31);
  m.def(
      "apply_rope_with_cos_sin_cache(Tensor positions, Tensor query, Tensor key, "
      "SymInt head_size, Tensor cos_sin_cache, bool is_neox=True) -> (Tensor, Tensor)");
  m.def(
      "apply_rope_with_cos_sin_cache_inplace(Tensor positions, Tensor(a!) query, Tensor(b!) key, "
      "SymInt head_size, Tensor cos_sin_cache, bool is_neox=True) -> ()");
}

static void kernels(Library& m) {
  m.impl("apply_rope", TORCH_BOX(&apply_rope));
  m.impl("apply_rope_inplace", TORCH_BOX(&apply_rope_inplace));
  m.impl("apply_rope_pos_ids", TORCH_BOX(&apply_rope_pos_ids));
  m.impl("apply_rope_pos_ids_inplace", TORCH_BOX(&apply_rope_pos_ids_inplace));
  m.impl("apply_llama31_rope", TORCH_BOX(&apply_llama31_rope));
  m.impl("apply_llama31_rope_inplace", TORCH_BOX(&apply_llama31_rope_inplace));
  m.impl("apply_llama31_rope_pos_ids", TORCH_BOX(&apply_llama31_rope_pos_ids));
  m.impl("apply_llama31_rope_pos_ids_inplace", TORCH_BOX(&apply_llama31_rope_pos_ids_inplace));
  m.impl("apply_rope_with_cos_sin_cache", TORCH_BOX(&apply_rope_with_cos_sin_cache));
  m.impl("apply_rope_with_cos_sin_cache_inplace",
         TORCH_BOX(&apply_rope_with_cos_sin_cache_inplace));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
