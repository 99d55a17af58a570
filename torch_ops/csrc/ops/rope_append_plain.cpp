#include "ops/rope_append_plain.h"

#include <algorithm>
#include <array>
#include <limits>

#include "runtime/names.h"

namespace ridgeline {
namespace {

constexpr const char* kEntry = "rope/rope_append_plain.cuh:rope_append_plain";
constexpr std::array kPairings = {"HalfSplit", "Interleaved"};
constexpr std::array kTypes = {Dtype::Half, Dtype::BFloat16};
constexpr std::array kTargets = {Dtype::Half, Dtype::BFloat16, Dtype::Float8_e4m3fn,
                                 Dtype::Float8_e5m2};  // of a cache; 16 bits: the type itself

bool serves(const Conversion& types) {
  const bool is_float8 = types.to == Dtype::Float8_e4m3fn || types.to == Dtype::Float8_e5m2;
  return std::ranges::count(kTypes, types.from) > 0 && (is_float8 || types.to == types.from);
}

Kernel& plain_kernel(const Conversion& types, bool interleave, bool norms) {
  static const auto kernels = [] {
    std::array<std::array<std::array<Kernel*, 4>, kTargets.size()>, kTypes.size()> found{};
    for (size_t from = 0; from < kTypes.size(); ++from) {
      for (size_t to = 0; to < kTargets.size(); ++to) {
        const Conversion each{kTypes[from], kTargets[to]};
        if (!serves(each)) continue;
        for (const int i : {0, 1, 2, 3}) {
          found[from][to][i] = &kernel(plain_name(each, i / 2 != 0, i % 2 != 0));
        }
      }
    }
    return found;
  }();
  const size_t from = std::ranges::find(kTypes, types.from) - kTypes.begin();
  const size_t to = std::ranges::find(kTargets, types.to) - kTargets.begin();
  return *kernels[from][to][2 * interleave + norms];
}

bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool fits(int64_t stride) {
  return stride >= 0 && stride <= std::numeric_limits<uint32>::max();
}

}  // namespace

bool serves_plain(const Conversion& types, int64_t head_dim, int64_t rotary_dim) {
  return serves(types) && head_dim == kRopePlainHeadDim && rotary_dim == kRopePlainHeadDim;
}

std::string plain_name(const Conversion& types, bool interleave, bool norms) {
  return kernel_name(kEntry, device_type(types.from), device_type(types.to), kPairings[interleave],
                     norms);
}

std::vector<Row> rope_plain_rows(const char* op, const Conversion& types) {
  std::vector<Row> rows;
  if (!serves(types)) return rows;
  for (const bool interleave : {false, true}) {
    for (const bool norms : {false, true}) {
      rows.push_back({.op = op,
                      .kernel = plain_name(types, interleave, norms),
                      .block = static_cast<int>(kRopePlainWarps * 32),
                      .why = norms ? "heads of 128, with norms" : "heads of 128"});
    }
  }
  return rows;
}

bool is_rope_plain(const RopePlainCall& call) {
  const RopeAppendParams& params = call.params;
  const auto is_plain_side = [&](const CacheSide& side) {
    return side.source_head_stride == kRopePlainHeadDim && fits(side.source_token_stride) &&
           side.scales == nullptr && fits(side.target_strides.head * params.shape.num_kv_heads);
  };
  return serves_plain(call.types, call.head_dim, 2 * params.shape.num_pairs) &&
         call.head_dim_vo == kRopePlainHeadDim && params.cache.values == nullptr &&
         !params.pos_ids.are_int64 && !params.positions.are_int64 &&
         !params.batch_indices.are_int64 && params.q.input_head_stride == kRopePlainHeadDim &&
         params.q.output_head_stride == kRopePlainHeadDim && fits(params.q.input_token_stride) &&
         fits(params.q.output_token_stride) && is_plain_side(params.k) && is_plain_side(params.v) &&
         !params.norm.weights_are_float && is_aligned16(params.norm.q_weight) &&
         is_aligned16(params.norm.k_weight);
}

void launch_rope_plain(const RopePlainCall& call, const Device& device) {
  const RopeAppendParams& from = call.params;
  const RopeAppendShape& shape = from.shape;
  const auto slices_of = [](uint32 num_heads) {
    return (num_heads + kRopePlainHeads - 1) / kRopePlainHeads;
  };
  const auto numbers = [](const Indices& indices) {
    return static_cast<const int32*>(indices.data);
  };
  const uint32 q_slices = slices_of(shape.num_q_heads), kv_slices = slices_of(shape.num_kv_heads);
  const uint32 num_slices = q_slices + 2 * kv_slices;
  RopePlainParams params = {
      .num_slices = make_divider(num_slices),
      .num_tokens = shape.nnz,
      .first_k_slice = q_slices,
      .first_v_slice = q_slices + kv_slices,
      .num_q_heads = shape.num_q_heads,
      .num_kv_heads = shape.num_kv_heads,
      .pos_ids = numbers(from.pos_ids),
      .q_out = from.q.output,
      .q = from.q.input,
      .k = from.k.source,
      .v = from.v.source,
      .q_token_stride = static_cast<uint32>(from.q.input_token_stride),
      .k_token_stride = static_cast<uint32>(from.k.source_token_stride),
      .v_token_stride = static_cast<uint32>(from.v.source_token_stride),
      .q_out_token_stride = static_cast<uint32>(from.q.output_token_stride),
      .q_weight = from.norm.q_weight,
      .k_weight = from.norm.k_weight,
      .eps = from.norm.eps,
      .k_inverse_scale = from.k.inverse_scale,
      .batch_indices = numbers(from.batch_indices),
      .positions = numbers(from.positions),
      .table = from.table,
      .v_inverse_scale = from.v.inverse_scale,
      .k_cache = from.k.target,
      .v_cache = from.v.target,
      .k_strides = from.k.target_strides,
      .v_strides = from.v.target_strides,
      .turns = {},
  };
  std::copy_n(from.frequencies.turns, kRopePlainHeadDim / 2, params.turns);
  const unsigned groups = (shape.nnz + kRopePlainWarps - 1) / kRopePlainWarps;
  launch(plain_kernel(call.types, call.interleave, from.norm.q_weight != nullptr), device,
         {.grid_x = groups * num_slices, .block = kRopePlainWarps * 32}, &params);
}

}  // namespace ridgeline
