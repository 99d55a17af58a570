// The schemas of the attention ops: a narrow one for common calls, since each argument costs host
// time, and the full one.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(ridgeline, m) {
  m.def(
      "single_attention(Tensor q, Tensor k, Tensor v, int kv_layout, bool causal, "
      "SymInt window_left, float logits_soft_cap, float? sm_scale) -> Tensor");
  m.def(
      "single_attention_full(Tensor q, Tensor k, Tensor v, int kv_layout, bool causal, "
      "SymInt window_left, float logits_soft_cap, float? sm_scale, int pos_encoding_mode, "
      "float rope_scale, float rope_theta, bool use_fp16_qk_reduction, Tensor? custom_mask=None, "
      "Tensor? mask_indptr=None, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, Tensor[]? extra_tensors=None, float[]? extra_scalars=None) "
      "-> (Tensor, Tensor)");
}
