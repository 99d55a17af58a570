// Options and dtypes that the attention ops have in common: what they may be, and what kernels are
// told of them.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "runtime/check.h"
#include "runtime/device.h"

namespace ridgeline {

inline constexpr int64_t kMaxHeadDim = 256;

using MaybeTensor = std::optional<Tensor>;

struct LogitOptions {
  double sm_scale = 1.0;
  double logits_soft_cap = 0.0;
  bool rotates = false;  // pos_encoding_mode ROPE_LLAMA
  double rope_scale = 1.0;
  double rope_theta = 1e4;
  bool fp16_logits = false;  // use_fp16_qk_reduction
};

inline double scale_or_default(const std::optional<double>& sm_scale, int64_t head_dim_qk) {
  return sm_scale ? *sm_scale : 1.0 / std::sqrt(static_cast<double>(head_dim_qk));
}

// The options of a full op, from its arguments; fails where one of them has no meaning.
LogitOptions logit_options(const Arg& q, double sm_scale, double logits_soft_cap,
                           int64_t pos_encoding_mode, double rope_scale, double rope_theta,
                           bool use_fp16_qk_reduction);

void check_soft_cap(const char* op, double logits_soft_cap);
void check_window(const char* op, int64_t window_left);

// Fails for the arguments of later versions, unless they are None.
void refuse_later(const char* op, const MaybeTensor& custom_mask, const MaybeTensor& mask_indptr,
                  const MaybeTensor& q_scale, const MaybeTensor& k_scale,
                  const MaybeTensor& v_scale, const MaybeTensor& sinks,
                  const std::optional<std::vector<Tensor>>& extra_tensors,
                  const std::optional<std::vector<double>>& extra_scalars);

// One 16-bit dtype of queries, keys and values that the GPU has tensor cores for.
void check_attention_dtypes(const Arg& q, const Arg& k, const Arg& v, const Device& gpu);

// As AttentionParams has them.
double rope_turns(const LogitOptions& options);
double rope_ratio(const LogitOptions& options, int64_t head_dim_qk);

}  // namespace ridgeline
