#include "ops/rope_angles.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

namespace ridgeline {
namespace {

double scaled(double frequency, const AngleOptions& options) {
  const double divided = frequency / options.rope_scale;
  if (!options.llama31) return divided;
  const auto& [low, high, length] = *options.llama31;
  const double turns = frequency * length / (2 * std::numbers::pi);
  const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
  return (1 - kept) * divided + kept * frequency;
}

std::vector<uint64> turns_per_position(uint32 num_pairs, const AngleOptions& options) {
  std::vector<uint64> turns(num_pairs);
  for (uint32 i = 0; i < num_pairs; ++i) {
    const double exponent = -static_cast<double>(i) / num_pairs;
    const double turn =
        scaled(std::pow(options.rope_theta, exponent), options) / (2 * std::numbers::pi);
    turns[i] = static_cast<uint64>(std::ldexp(turn - std::floor(turn), 64));
  }
  return turns;
}

struct Known {
  uint32 num_pairs = 0;
  AngleOptions options;
  std::vector<uint64> turns;
};

}  // namespace

void check_rotary_dim(const char* op, int64_t rotary_dim, int64_t head_dim, int64_t limit) {
  if (rotary_dim % 2 == 0 && rotary_dim > 0 && rotary_dim <= std::min(head_dim, limit)) return;
  fail(op, "rotary_dim",
       "an even number from 2 to head_dim (" + std::to_string(head_dim) + ") and at most " +
           std::to_string(limit),
       std::to_string(rotary_dim), "Leave it out to rotate whole heads");
}

void check_angles(const char* op, const AngleOptions& options) {
  for (const auto& [name, value] :
       {std::pair{"rope_scale", options.rope_scale}, std::pair{"rope_theta", options.rope_theta}}) {
    if (std::isfinite(value) && value > 0) continue;
    fail(op, name, "a finite number > 0", std::to_string(value), "Leave it out for the default");
  }
  if (!options.llama31) return;
  const auto& [low, high, length] = *options.llama31;
  if (!(std::isfinite(length) && length > 0)) {
    fail(op, "old_context_len", "a finite number > 0", std::to_string(length),
         "It is the context that the model was first trained on");
  }
  if (!(std::isfinite(low) && low >= 0)) {
    fail(op, "low_freq_factor", "a finite number >= 0", std::to_string(low), "Llama 3.1 has 1");
  }
  if (!(std::isfinite(high) && high > low)) {
    fail(op, "high_freq_factor",
         "a finite number above low_freq_factor (" + std::to_string(low) + ")",
         std::to_string(high), "Llama 3.1 has 4");
  }
}

void fill_frequencies(Frequencies& frequencies, uint32 num_pairs, const AngleOptions& options) {
  // A model calls with one set of options or two, so each thread keeps the last few.
  thread_local std::array<Known, 4> known;
  thread_local size_t oldest = 0;
  const auto found = std::ranges::find_if(known, [&](const Known& entry) {
    return entry.num_pairs == num_pairs && entry.options == options;
  });
  if (found != known.end()) {
    std::ranges::copy(found->turns, frequencies.turns);
    return;
  }
  Known& entry = known[oldest];
  oldest = (oldest + 1) % known.size();
  entry = {num_pairs, options, turns_per_position(num_pairs, options)};
  std::ranges::copy(entry.turns, frequencies.turns);
}

CosSinCache cos_sin_cache_of(const Arg& cache, const Arg& as, int64_t nnz) {
  check_same_device(cache, as);
  check_dtype(cache, {Dtype::Float});
  check_rank(cache, {2});
  check_last_stride(cache);
  if (cache.sizes[0] == 0 && nnz > 0) {
    fail(cache.op, cache.name, "at least 1 position", shape_text(cache.tensor),
         "Make it as long as the longest context");
  }
  return {.values = static_cast<const float*>(cache.data),
          .stride = cache.strides[0],
          .num_positions = cache.sizes[0],
          .num_pairs = static_cast<uint32>(cache.sizes[1] / 2)};
}

}  // namespace ridgeline
