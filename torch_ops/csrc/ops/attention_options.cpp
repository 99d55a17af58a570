#include "ops/attention_options.h"

#include <cmath>
#include <numbers>
#include <string>
#include <utility>

namespace ridgeline {

LogitOptions logit_options(const Arg& q, double sm_scale, double logits_soft_cap,
                           int64_t pos_encoding_mode, double rope_scale, double rope_theta,
                           bool use_fp16_qk_reduction) {
  check_soft_cap(q.op, logits_soft_cap);
  if (pos_encoding_mode == 2) not_yet(q.op, "pos_encoding_mode", "2 (ALIBI)");
  if (pos_encoding_mode != 0 && pos_encoding_mode != 1) {
    fail(q.op, "pos_encoding_mode", "0 (NONE) or 1 (ROPE_LLAMA)", std::to_string(pos_encoding_mode),
         "Pass one of these");
  }
  for (const auto& [name, value] :
       {std::pair{"rope_scale", rope_scale}, std::pair{"rope_theta", rope_theta}}) {
    if (!(value > 0.0)) {
      fail(q.op, name, "a positive number", std::to_string(value), "Leave it out for the default");
    }
  }
  if (use_fp16_qk_reduction && q.dtype != Dtype::Half) {
    fail(q.op, "use_fp16_qk_reduction", "False unless q is float16", "True with bfloat16",
         "Leave it out, or convert q, k and v to float16");
  }
  return {sm_scale,   logits_soft_cap, pos_encoding_mode == 1,
          rope_scale, rope_theta,      use_fp16_qk_reduction};
}

void check_soft_cap(const char* op, double logits_soft_cap) {
  if (logits_soft_cap >= 0.0) return;
  fail(op, "logits_soft_cap", "a positive number, or 0", std::to_string(logits_soft_cap),
       "0 turns it off");
}

void check_window(const char* op, int64_t window_left) {
  if (window_left >= -1) return;
  fail(op, "window_left", "at least -1", std::to_string(window_left), "-1 turns it off");
}

void refuse_later(const char* op, const MaybeTensor& custom_mask, const MaybeTensor& mask_indptr,
                  const MaybeTensor& q_scale, const MaybeTensor& k_scale,
                  const MaybeTensor& v_scale, const MaybeTensor& sinks,
                  const std::optional<std::vector<Tensor>>& extra_tensors,
                  const std::optional<std::vector<double>>& extra_scalars) {
  for (const auto& [name, given] :
       {std::pair{"custom_mask", custom_mask.has_value()},
        std::pair{"mask_indptr", mask_indptr.has_value()},
        std::pair{"q_scale", q_scale.has_value()}, std::pair{"k_scale", k_scale.has_value()},
        std::pair{"v_scale", v_scale.has_value()}, std::pair{"sinks", sinks.has_value()},
        std::pair{"extra_tensors", extra_tensors.has_value()},
        std::pair{"extra_scalars", extra_scalars.has_value()}}) {
    if (given) not_yet(op, name, "a value other than None");
  }
}

void check_attention_dtypes(const Arg& q, const Arg& k, const Arg& v, const Device& gpu) {
  if (q.dtype == Dtype::Float) {
    fail(q.op, q.name, "dtype torch.float16 or torch.bfloat16 on a GPU", "torch.float32",
         "Convert q, k and v with .to(torch.float16): tensor cores sum in float32 all the same");
  }
  check_dtype(q, {Dtype::Half, Dtype::BFloat16});
  check_same_dtype(k, q);
  check_same_dtype(v, q);
  if (q.dtype == Dtype::BFloat16 && gpu.sm < 80) {
    fail(q.op, q.name,
         "dtype torch.float16 on GPUs before compute capability 8.0, which have no bf16 tensor "
         "cores",
         "torch.bfloat16", "Convert q, k and v with .to(torch.float16)");
  }
}

double rope_turns(const LogitOptions& options) {
  return 0.5 * std::numbers::inv_pi / options.rope_scale;
}

double rope_ratio(const LogitOptions& options, int64_t head_dim_qk) {
  if (!options.rotates) return 1.0;
  return std::pow(options.rope_theta, -2.0 / static_cast<double>(head_dim_qk));
}

}  // namespace ridgeline
