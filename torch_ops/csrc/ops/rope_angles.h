// The angles of rotary embedding as options of ops: their checks, and what kernels are told of
// them.
#pragma once

#include <optional>

#include "rope/params.h"
#include "runtime/check.h"

namespace ridgeline {

// The scaling of Llama 3.1: a frequency that turns fewer than low_freq_factor times in
// old_context_len positions is divided by rope_scale, one that turns more than high_freq_factor
// times stays, and between them both are mixed linearly.
struct Llama31Scaling {
  double low_freq_factor;
  double high_freq_factor;
  double old_context_len;

  bool operator==(const Llama31Scaling&) const = default;
};

struct AngleOptions {
  double rope_scale = 1.0;
  double rope_theta = 1e4;
  std::optional<Llama31Scaling> llama31 = {};

  bool operator==(const AngleOptions&) const = default;
};

void check_rotary_dim(const char* op, int64_t rotary_dim, int64_t head_dim, int64_t limit);
void check_angles(const char* op, const AngleOptions& options);

// theta^(-i / num_pairs) / (2 pi rope_scale) turns a position, scaled as asked.
void fill_frequencies(Frequencies& frequencies, uint32 num_pairs, const AngleOptions& options);

// [max_position, rotary_dim] float32 on the device of `as`; no position is fine for no token.
CosSinCache cos_sin_cache_of(const Arg& cache, const Arg& as, int64_t nnz);

}  // namespace ridgeline
