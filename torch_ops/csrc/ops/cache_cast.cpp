#include "ops/cache_cast.h"

#include <cmath>
#include <string>

#include "runtime/overlap.h"

namespace ridgeline {
namespace {

void set_scale(CacheSide& result, const Side& side, bool converts) {
  const Scale& scale = side.scale;
  const char* op = side.target.op;
  if (!(std::isfinite(scale.value) && scale.value > 0)) {
    fail(op, scale.name, "a finite number > 0", std::to_string(scale.value), "1 changes nothing");
  }
  if (!converts && (scale.values || scale.value != 1.0)) {
    fail(op, scale.name, "None or 1, since the cache has the dtype of what is appended",
         scale.values ? "a tensor" : std::to_string(scale.value),
         "Use a cache of lower precision, or divide beforehand");
  }
  result.inverse_scale = 1.0f / static_cast<float>(scale.value);
  if (!scale.values) return;
  const Arg arg{op, scale.name, *scale.values};
  check_same_device(arg, side.target);
  check_dtype(arg, {Dtype::Float});
  check_rank(arg, {0, 1});
  const int64_t size = arg.tensor.dim() == 0 ? 1 : arg.tensor.size(0);
  if (size != 1 && size != side.cache.num_heads) {
    fail(op, scale.name,
         "1 number or one for each of the " + std::to_string(side.cache.num_heads) + " heads",
         shape_text(arg.tensor), "Pass a tensor of that shape");
  }
  result.scales = static_cast<const float*>(arg.tensor.const_data_ptr());
  result.scale_stride = size == 1 ? 0 : arg.tensor.stride(0);
}

}  // namespace

void check_source(const Side& side, int64_t nnz) {
  const Arg& arg = side.source;
  const PagedCache& cache = side.cache;
  check_same_device(arg, side.target);
  if (side.target.rank() == 3) {
    check_rank(arg, {2});
    check_shape(arg, std::array{nnz, cache.head_dim}, "[nnz, head_dim], as the cache's");
  } else {
    check_rank(arg, {3});
    check_shape(arg, std::array{nnz, cache.num_heads, cache.head_dim},
                "[nnz, num_kv_heads, head_dim], as the cache's");
  }
  check_last_stride(arg);
  check_writable(side.target);
  check_distinct(side.target, arg);
}

std::optional<size_t> conversion_of(const Side& side) {
  const Dtype from = side.source.dtype, to = side.target.dtype;
  if (from == to) return {};
  for (size_t i = 0; i < kConversions.size(); ++i) {
    if (kConversions[i].from == from && kConversions[i].to == to) return i;
  }
  fail(side.target.op, side.target.name,
       "dtype " + dtype_name(from) + " (that of '" + side.source.name +
           "') or a lower precision: float8_e4m3fn or float8_e5m2 from float16, bfloat16 or "
           "float32, float16 or bfloat16 from float32",
       dtype_name(to), std::string("Convert '") + side.source.name + "' first");
}

CacheSide cache_side(const Side& side, int64_t unit, bool converts) {
  const Arg& source = side.source;
  const PagedStrides& strides = side.cache.strides;
  CacheSide result{};
  result.source = source.data;
  const Tensor& target = side.target.tensor;
  result.target = static_cast<char*>(target.mutable_data_ptr()) +
                  (static_cast<const char*>(side.target.data) -
                   static_cast<const char*>(target.const_data_ptr()));
  result.source_token_stride = source.strides[0] * unit;
  result.source_head_stride = source.rank() == 3 ? source.strides[1] * unit : 0;
  result.target_strides = {strides.page * unit, strides.token * unit, strides.head * unit};
  set_scale(result, side, converts);
  return result;
}

}  // namespace ridgeline
