// rope_append_paged_kv_cache and rope_append_paged_kv_cache_full: schemas, checks, choice of
// kernel, launch. The first has the arguments of the common cases, the second all of them.

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/cache_cast.h"
#include "ops/rope_angles.h"
#include "ops/rope_append_plain.h"
#include "rope/params.h"
#include "runtime/catalog.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"
#include "runtime/paged_cache.h"

namespace ridgeline {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "rope_append_paged_kv_cache";
constexpr const char* kEntry = "rope/rope_append_paged_kv_cache.cuh:rope_append_paged_kv_cache";
constexpr std::array kPairings = {"HalfSplit", "Interleaved"};
constexpr std::array kTypes = {Dtype::Half, Dtype::BFloat16, Dtype::Float};

// The argument `flags`, as torch_ops/rope_append.py has it.
enum Flag : int64_t { kHnd = 1, kInterleave = 2 };

int wide_elements(Dtype dtype) {
  return dtype == Dtype::Float ? 4 : 8;  // 16 bytes
}

std::string append_name(const Conversion& types, int vec_size, bool interleave) {
  return kernel_name(kEntry, device_type(types.from), device_type(types.to), vec_size,
                     kPairings[interleave]);
}

// The caches that each type may go to: its own, and those of kConversions.
std::vector<Conversion> all_types() {
  std::vector<Conversion> all;
  for (const Dtype type : kTypes) all.push_back({type, type});
  all.insert(all.end(), kConversions.begin(), kConversions.end());
  return all;
}

Kernel& append_kernel(Dtype from, std::optional<size_t> conversion, bool wide, bool interleave) {
  using Variants = std::array<Kernel*, 4>;
  static const auto kernels = [] {
    std::vector<Variants> found;
    for (const Conversion& types : all_types()) {
      const int vec_size = wide_elements(types.from);
      found.push_back({&kernel(append_name(types, 1, false)), &kernel(append_name(types, 1, true)),
                       &kernel(append_name(types, vec_size, false)),
                       &kernel(append_name(types, vec_size, true))});
    }
    return found;
  }();
  const size_t same = std::ranges::find(kTypes, from) - kTypes.begin();
  return *kernels[conversion ? kTypes.size() + *conversion : same][2 * wide + interleave];
}

std::vector<Row> append_rows() {
  std::vector<Row> rows;
  for (const Conversion& types : all_types()) {
    for (const bool interleave : {false, true}) {
      const auto add = [&](int vec_size, const char* why) {
        rows.push_back({.op = kOp,
                        .kernel = append_name(types, vec_size, interleave),
                        .block = static_cast<int>(kRopeAppendWarps * 32),
                        .why = why});
      };
      add(wide_elements(types.from), "16-byte accesses");
      add(1, "views or sizes that are not multiples of 16 bytes");
    }
    const std::vector<Row> plain = rope_plain_rows(kOp, types);
    rows.insert(rows.end(), plain.begin(), plain.end());
  }
  return rows;
}

Choice append_choose(const std::string&, const Config& config, int) {
  const std::string dtype = "torch." + config.get("dtype", "float16");
  const std::string kv_dtype = "torch." + config.get("kv_dtype", config.get("dtype", "float16"));
  for (const Conversion& types : all_types()) {
    if (dtype != dtype_name(types.from) || kv_dtype != dtype_name(types.to)) continue;
    const bool interleave = config.get_int("interleave", 0) != 0;
    const long head_dim = config.get_int("head_dim", 0);
    if (serves_plain(types, head_dim, config.get_int("rotary_dim", head_dim))) {
      return {{plain_name(types, interleave, config.get_int("qk_norm", 0) != 0)}, {}};
    }
    return {{append_name(types, wide_elements(types.from), interleave)}, {}};
  }
  return {{},
          {"dtype " + dtype + " into kv_dtype " + kv_dtype +
           ": expected the same, or float16, bfloat16 or float32 into a lower precision"}};
}

const RegisterFamily family({{kOp, "rope_append_paged_kv_cache_full"}, append_rows, append_choose});

// What some calls leave out.
struct Options {
  const MaybeTensor& pos_ids;
  const MaybeTensor& q_weight;
  const MaybeTensor& k_weight;
  double norm_eps;
  const MaybeTensor& cos_sin_cache;
  int64_t rotary_dim;  // 0: the head_dim, or the table's
  AngleOptions angles;
};

void check_query(const Arg& q, const Arg& q_out, const PagedCache& k_cache, int64_t nnz,
                 const Arg& as) {
  check_same_device(q, as);
  check_dtype(q, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_rank(q, {3});
  check_shape(q, std::array{nnz, q.sizes[1], k_cache.head_dim},
              "[nnz, num_q_heads, head_dim], as 'positions' and the cache's");
  check_last_stride(q);
  check_same_device(q_out, as);
  check_same_dtype(q_out, q);
  check_shape(q_out, q.sizes, "that of 'q'");
  check_last_stride(q_out);
  check_writable(q_out);
  check_out(q_out, q);
}

HeadNorm head_norm(const Options& options, const Arg& q) {
  if (!options.q_weight && !options.k_weight) return {};
  if (!options.q_weight || !options.k_weight) {
    fail(kOp, options.q_weight ? "k_weight" : "q_weight",
         std::string("a tensor, as '") + (options.q_weight ? "q_weight" : "k_weight") + "' is",
         "None", "Pass both, or neither for no norm");
  }
  if (!(std::isfinite(options.norm_eps) && options.norm_eps >= 0)) {
    fail(kOp, "norm_eps", "a finite number >= 0", std::to_string(options.norm_eps),
         "1e-6 is the default");
  }
  const Arg q_weight{kOp, "q_weight", *options.q_weight};
  const Arg k_weight{kOp, "k_weight", *options.k_weight};
  for (const Arg& weight : {q_weight, k_weight}) {
    check_same_device(weight, q);
    if (weight.dtype != Dtype::Float) check_same_dtype(weight, q);
    check_rank(weight, {1});
    check_shape(weight, std::array{q.sizes[2]}, "[head_dim]");
    check_last_stride(weight);
  }
  check_same_dtype(k_weight, q_weight);
  return {.q_weight = q_weight.data,
          .k_weight = k_weight.data,
          .weights_are_float = q_weight.dtype == Dtype::Float,
          .head_dim = static_cast<float>(q.sizes[2]),
          .eps = static_cast<float>(options.norm_eps)};
}

// The rotary_dim in force; fills the source of the angles.
int64_t set_angles(RopeAppendParams& params, const Options& options, const Arg& q) {
  const int64_t head_dim = q.sizes[2];
  params.cache = {};
  if (options.cos_sin_cache) {
    const Arg cache{kOp, "cos_sin_cache", *options.cos_sin_cache};
    params.cache = cos_sin_cache_of(cache, q, q.sizes[0]);
    const int64_t width = cache.sizes[1];
    const int64_t rotary_dim = options.rotary_dim == 0 ? width : options.rotary_dim;
    check_rotary_dim(kOp, rotary_dim, head_dim, kRopeAppendMaxHeadDim);
    check_shape(cache, std::array{cache.sizes[0], rotary_dim}, "[max_position, rotary_dim]");
    if (!(options.angles == AngleOptions{})) {
      fail(kOp, "cos_sin_cache", "None where rope_scale, rope_theta or a scaling are given",
           "a tensor", "Its angles are scaled already: leave the others out");
    }
    return rotary_dim;
  }
  const int64_t rotary_dim = options.rotary_dim == 0 ? head_dim : options.rotary_dim;
  check_rotary_dim(kOp, rotary_dim, head_dim, kRopeAppendMaxHeadDim);
  check_angles(kOp, options.angles);
  fill_frequencies(params.frequencies, static_cast<uint32>(rotary_dim / 2), options.angles);
  return rotary_dim;
}

// Weights come four at a time then.
bool is_wide(const std::array<Side, 2>& sides, const Arg& q, const Arg& q_out, const HeadNorm& norm,
             int64_t rotary_dim) {
  const int vec_size = wide_elements(q.dtype);
  const int64_t target_bytes = std::min<int64_t>(vec_size * sides[0].target.element_size(), 16);
  const auto weight_bytes = static_cast<uintptr_t>(
      4 * (norm.weights_are_float ? sizeof(float) : static_cast<size_t>(q.element_size())));
  return rotary_dim / 2 % vec_size == 0 && q.sizes[2] % vec_size == 0 && is_aligned16(q) &&
         is_aligned16(q_out) && reinterpret_cast<uintptr_t>(norm.q_weight) % weight_bytes == 0 &&
         reinterpret_cast<uintptr_t>(norm.k_weight) % weight_bytes == 0 &&
         std::ranges::all_of(sides, [&](const Side& side) {
           return side.cache.head_dim % vec_size == 0 && is_aligned16(side.source) &&
                  is_aligned(side.target, target_bytes);
         });
}

void run(const Arg& q, const std::array<Side, 2>& sides, const Tensor& batch_indices,
         const Arg& positions, const Tensor& kv_indices, const Tensor& kv_indptr, const Arg& q_out,
         bool interleave, const Options& options) {
  const auto& [k, v] = sides;
  check_cuda(k.target);
  check_paged_pair(k.target, k.cache, v.target, v.cache);
  const int64_t nnz = positions.rank() == 1 ? positions.sizes[0] : 0;
  RopeAppendParams params;
  params.positions = indices_of(positions, nnz, "[nnz]", k.target);
  params.batch_indices =
      indices_of({kOp, "batch_indices", batch_indices}, nnz, "[nnz], as 'positions'", k.target);
  params.pos_ids = options.pos_ids ? indices_of({kOp, "pos_ids", *options.pos_ids}, nnz,
                                                "[nnz], as 'positions'", k.target)
                                   : params.positions;
  params.table =
      page_table({kOp, "kv_indices", kv_indices}, {kOp, "kv_indptr", kv_indptr}, k.cache, k.target);
  check_query(q, q_out, k.cache, nnz, k.target);
  for (const Side& side : sides) {
    check_source(side, nnz);
    check_same_dtype(side.source, q);
    check_distinct(side.target, q);
    check_distinct(q_out, side.source);
    check_distinct(q_out, side.target);
  }
  check_distinct(v.target, k.target);
  for (const auto& [arg, head_dim] :
       {std::pair{q, q.sizes[2]}, std::pair{v.source, v.cache.head_dim}}) {
    if (head_dim <= kRopeAppendMaxHeadDim) continue;
    fail(kOp, arg.name, "a head_dim of at most " + std::to_string(kRopeAppendMaxHeadDim),
         std::to_string(head_dim), "Call apply_rope_pos_ids and append_paged_kv_cache");
  }
  if (nnz > kMaxCount) {
    fail(kOp, q.name, "fewer than 2^31 tokens", std::to_string(nnz), "Split the call");
  }
  params.norm = head_norm(options, q);
  const auto rotary_dim = static_cast<uint32>(set_angles(params, options, q));
  const std::optional<size_t> conversion = conversion_of(k);
  params.k = cache_side(k, 1, conversion.has_value());
  params.v = cache_side(v, 1, conversion.has_value());
  const auto num_q_heads = static_cast<uint32>(q.sizes[1]);
  const auto num_kv_heads = static_cast<uint32>(k.cache.num_heads);
  if (nnz == 0 || num_q_heads + num_kv_heads == 0) return;

  const bool wide = is_wide(sides, q, q_out, params.norm, rotary_dim);
  const auto vec_size = static_cast<uint32>(wide ? wide_elements(q.dtype) : 1);
  const HeadUnits qk_units = head_units(static_cast<uint32>(q.sizes[2]), rotary_dim, vec_size);
  const HeadUnits v_units = head_units(static_cast<uint32>(v.cache.head_dim), 0, vec_size);
  const RopeAppendPlan plan =
      rope_append_plan(num_q_heads, num_kv_heads, std::max(qk_units.count(), v_units.count()),
                       static_cast<uint32>(nnz), static_cast<int>(vec_size));
  const int64_t num_warps = nnz * plan.num_slices;
  if (num_warps > kMaxCount) {
    fail(kOp, q.name, "fewer than 2^31 slices of heads", std::to_string(num_warps),
         "Split the call");
  }
  params.q = {.input = q.data,
              .output = q_out.tensor.mutable_data_ptr(),
              .input_token_stride = q.strides[0],
              .input_head_stride = q.strides[1],
              .output_token_stride = q_out.strides[0],
              .output_head_stride = q_out.strides[1]};
  params.shape = {.nnz = static_cast<uint32>(nnz),
                  .num_q_heads = num_q_heads,
                  .num_kv_heads = num_kv_heads,
                  .num_pairs = rotary_dim / 2,
                  .qk_units = qk_units,
                  .v_units = v_units,
                  .team_size = plan.team_size,
                  .q_heads_per_slice = plan.q_heads_per_slice,
                  .kv_heads_per_slice = plan.kv_heads_per_slice,
                  .num_q_slices = plan.num_q_slices,
                  .num_slices = make_divider(plan.num_slices),
                  .turning_units = make_divider(qk_units.num_turning)};
  const RopePlainCall plain{
      {q.dtype, sides[0].target.dtype}, interleave, q.sizes[2], v.cache.head_dim, params};
  if (wide && is_rope_plain(plain)) {
    launch_rope_plain(plain, device(k.target.gpu));
    return;
  }
  const auto token_groups = static_cast<unsigned>((nnz + kRopeAppendWarps - 1) / kRopeAppendWarps);
  launch(append_kernel(q.dtype, conversion, wide, interleave), device(k.target.gpu),
         {.grid_x = token_groups * plan.num_slices, .block = kRopeAppendWarps * 32}, &params);
}

void rope_append_full(const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& batch_indices, const Tensor& positions, const Tensor& k_cache,
                      const Tensor& v_cache, const Tensor& kv_indices, const Tensor& kv_indptr,
                      const Tensor& q_out, int64_t flags, double rope_theta,
                      const MaybeTensor& q_weight, const MaybeTensor& k_weight, double norm_eps,
                      const MaybeTensor& pos_ids, int64_t rotary_dim, double rope_scale,
                      double low_freq_factor, double high_freq_factor, double old_context_len,
                      const MaybeTensor& cos_sin_cache, double k_scale, double v_scale,
                      const MaybeTensor& k_scales, const MaybeTensor& v_scales) {
  const HalfCache k_half(kOp, "k_cache", k_cache, 0), v_half(kOp, "v_cache", v_cache, 1);
  const Arg &k_target = k_half.arg(), &v_target = v_half.arg();
  AngleOptions angles{rope_scale, rope_theta};
  if (old_context_len != 0) {
    angles.llama31 = Llama31Scaling{low_freq_factor, high_freq_factor, old_context_len};
  }
  const int64_t kv_layout = flags & kHnd;
  run({kOp, "q", q},
      {Side{{kOp, "k", k},
            k_target,
            paged_cache(k_target, kv_layout),
            {"k_scale", k_scale, k_scales}},
       Side{{kOp, "v", v},
            v_target,
            paged_cache(v_target, kv_layout),
            {"v_scale", v_scale, v_scales}}},
      batch_indices, {kOp, "positions", positions}, kv_indices, kv_indptr, {kOp, "q_out", q_out},
      (flags & kInterleave) != 0,
      {pos_ids, q_weight, k_weight, norm_eps, cos_sin_cache, rotary_dim, angles});
}

void rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& batch_indices,
                 const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& kv_indices, const Tensor& kv_indptr, const Tensor& q_out,
                 int64_t flags, double rope_theta, const MaybeTensor& q_weight,
                 const MaybeTensor& k_weight, double norm_eps) {
  const MaybeTensor none;
  rope_append_full(q, k, v, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr,
                   q_out, flags, rope_theta, q_weight, k_weight, norm_eps, none, 0, 1.0, 0.0, 0.0,
                   0.0, none, 1.0, 1.0, none, none);
}

}  // namespace

// A pool of 5 dimensions is both caches. Without a norm its arguments are left out: those with a
// default cost next to nothing then.
static void schemas(Library& m) {
  const std::string required =
      "(Tensor q, Tensor k, Tensor v, Tensor batch_indices, Tensor positions, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor kv_indices, Tensor kv_indptr, Tensor(c!) q_out, int flags, "
      "float rope_theta, Tensor? q_weight=None, Tensor? k_weight=None, float norm_eps=1e-6";
  m.def(("rope_append_paged_kv_cache" + required + ") -> ()").c_str());
  m.def(("rope_append_paged_kv_cache_full" + required +
         ", Tensor? pos_ids=None, SymInt rotary_dim=0, float rope_scale=1., "
         "float low_freq_factor=1., float high_freq_factor=4., float old_context_len=0., "
         "Tensor? cos_sin_cache=None, float k_scale=1., float v_scale=1., Tensor? k_scales=None, "
         "Tensor? v_scales=None) -> ()")
            .c_str());
}

static void kernels(Library& m) {
  m.impl("rope_append_paged_kv_cache", TORCH_BOX(&rope_append));
  m.impl("rope_append_paged_kv_cache_full", TORCH_BOX(&rope_append_full));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
