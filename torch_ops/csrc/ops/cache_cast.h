// The step of new keys and values into a cache: which conversions there are, and the scales that go
// with them. For every op that appends.
#pragma once

#include <array>
#include <optional>

#include "page/params.h"
#include "runtime/paged_cache.h"

namespace ridgeline {

struct Conversion {
  Dtype from;
  Dtype to;
};

inline constexpr std::array kConversions = {
    Conversion{Dtype::Half, Dtype::Float8_e4m3fn},
    Conversion{Dtype::Half, Dtype::Float8_e5m2},
    Conversion{Dtype::BFloat16, Dtype::Float8_e4m3fn},
    Conversion{Dtype::BFloat16, Dtype::Float8_e5m2},
    Conversion{Dtype::Float, Dtype::Float8_e4m3fn},
    Conversion{Dtype::Float, Dtype::Float8_e5m2},
    Conversion{Dtype::Float, Dtype::Half},
    Conversion{Dtype::Float, Dtype::BFloat16},
};

// What an element is divided by: one number, or one for each head.
struct Scale {
  const char* name;
  double value;
  const std::optional<Tensor>& values;
};

// New keys or values and where they go.
struct Side {
  Arg source;  // [nnz, num_heads, head_dim], or [nnz, head_dim] without heads
  Arg target;
  PagedCache cache;
  Scale scale;
};

// Fails unless the source has a row of the cache's shape for each of nnz tokens, and the target can
// be written beside it.
void check_source(const Side& side, int64_t nnz);

// Which of kConversions; none when the cache has the dtype of what is appended.
std::optional<size_t> conversion_of(const Side& side);

// What kernels are told of a side. Strides count elements, or bytes when nothing is converted
// (`unit` bytes an element then).
CacheSide cache_side(const Side& side, int64_t unit, bool converts);

}  // namespace ridgeline
