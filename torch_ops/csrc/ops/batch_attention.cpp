// attention, attention_plain, attention_lse, attention_plain_lse, attention_full, attention_out,
// attention_schedule: schemas and what they return. Checks: batch_inputs.cpp. Choice of kernel:
// batch_choice.cpp. Launches: batch_launch.cpp.

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/batch_launch.h"
#include "runtime/alloc.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"

namespace ridgeline {
namespace {

Tensor attention_schedule(const MaybeTensor& qo_indptr, const MaybeTensor& kv_indptr,
                          const MaybeTensor& kv_lens, int64_t flags, int64_t page_size,
                          int64_t num_qo_tokens, int64_t num_qo_heads, int64_t num_kv_heads,
                          int64_t head_dim_qk, int64_t head_dim_vo, int64_t max_q_len,
                          int64_t window_left) {
  constexpr const char* kOp = "attention_schedule";
  Lengths of = {kOp,           qo_indptr,
                kv_indptr,     kv_lens,
                flags,         page_size,
                num_qo_tokens, num_qo_heads,
                num_kv_heads,  head_dim_qk,
                head_dim_vo,   max_q_len,
                window_left,   form_of(kv_indptr && kv_lens, kv_indptr.has_value(), flags)};
  const Arg as = kv_indptr ? Arg{kOp, "kv_indptr", *kv_indptr}
                 : kv_lens ? Arg{kOp, "kv_lens", *kv_lens}
                           : Arg{kOp, "qo_indptr", *qo_indptr};
  check_cuda(as);
  check_length_tensors(of);
  check_lengths(of, as);
  const Device& gpu = device(as.gpu);
  const Tensor list = empty(as.gpu, {list_length(of)}, Dtype::Int);
  launch_schedule(of, gpu, list);
  return list;
}

BatchResults results_in(const Tensor& out, const Lengths& of, const Tensor* lse) {
  return {out.mutable_data_ptr(), of.num_qo_heads * of.head_dim_vo, of.head_dim_vo,
          lse ? static_cast<float*>(lse->mutable_data_ptr()) : nullptr};
}

Tensor empty_out(const Inputs& in, const Lengths& of) {
  return empty(in.q.gpu, {of.num_tokens, of.num_qo_heads, of.head_dim_vo}, in.q.dtype);
}

std::tuple<Tensor, Tensor> both_results(const Inputs& in, const Lengths& of,
                                        const BatchOptions& options, const Cache& cache) {
  const Tensor out = empty_out(in, of);
  const Tensor lse = empty(in.q.gpu, {of.num_tokens, of.num_qo_heads}, Dtype::Float);
  launch_attention(in, of, options, cache, results_in(out, of, &lse));
  return {out, lse};
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& kv_indices,
                 const MaybeTensor& schedule, const MaybeTensor& qo_indptr, int64_t flags,
                 int64_t max_q_len, int64_t window_left, const std::optional<double>& sm_scale,
                 const MaybeTensor& kv_indptr, const MaybeTensor& kv_lens) {
  constexpr const char* kOp = "attention";
  const Inputs in(kOp, q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, schedule);
  BatchOptions options = options_of(flags, window_left);
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  options.logits.sm_scale = scale_or_default(sm_scale, of.head_dim_qk);
  const Tensor out = empty_out(in, of);
  launch_attention(in, of, options, cache, results_in(out, of, nullptr));
  return out;
}

Tensor attention_plain(const Tensor& q, const Tensor& k, const Tensor& v,
                       const MaybeTensor& kv_indices, const MaybeTensor& schedule,
                       const MaybeTensor& qo_indptr, int64_t flags) {
  const MaybeTensor none;
  return attention(q, k, v, kv_indices, schedule, qo_indptr, flags, -1, -1, std::nullopt, none,
                   none);
}

std::tuple<Tensor, Tensor> attention_lse(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const MaybeTensor& kv_indices, const MaybeTensor& schedule,
                                         const MaybeTensor& qo_indptr, int64_t flags,
                                         int64_t max_q_len, int64_t window_left,
                                         const std::optional<double>& sm_scale,
                                         const MaybeTensor& kv_indptr, const MaybeTensor& kv_lens) {
  constexpr const char* kOp = "attention_lse";
  const Inputs in(kOp, q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, schedule);
  BatchOptions options = options_of(flags, window_left);
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  options.logits.sm_scale = scale_or_default(sm_scale, of.head_dim_qk);
  return both_results(in, of, options, cache);
}

std::tuple<Tensor, Tensor> attention_plain_lse(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const MaybeTensor& kv_indices,
                                               const MaybeTensor& schedule,
                                               const MaybeTensor& qo_indptr, int64_t flags) {
  const MaybeTensor none;
  return attention_lse(q, k, v, kv_indices, schedule, qo_indptr, flags, -1, -1, std::nullopt, none,
                       none);
}

std::tuple<Tensor, Tensor> attention_full(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& kv_indices,
    const MaybeTensor& schedule, const MaybeTensor& qo_indptr, int64_t flags, int64_t max_q_len,
    int64_t window_left, const std::optional<double>& sm_scale, const MaybeTensor& kv_indptr,
    const MaybeTensor& kv_lens, double logits_soft_cap, int64_t pos_encoding_mode,
    double rope_scale, double rope_theta, bool use_fp16_qk_reduction,
    const MaybeTensor& custom_mask, const MaybeTensor& mask_indptr, const MaybeTensor& q_scale,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, const MaybeTensor& sinks,
    const std::optional<std::vector<Tensor>>& extra_tensors,
    const std::optional<std::vector<double>>& extra_scalars) {
  constexpr const char* kOp = "attention_full";
  refuse_later(kOp, custom_mask, mask_indptr, q_scale, k_scale, v_scale, sinks, extra_tensors,
               extra_scalars);
  const Inputs in(kOp, q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, schedule);
  BatchOptions options = options_of(flags, window_left);
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  options.logits = logit_options(in.q, scale_or_default(sm_scale, of.head_dim_qk), logits_soft_cap,
                                 pos_encoding_mode, rope_scale, rope_theta, use_fp16_qk_reduction);
  return both_results(in, of, options, cache);
}

// A result that the caller gives: of the result's shape and dtype, sharing no memory with what the
// kernels read or with the other result.
void check_result(const Arg& result, Dtype dtype, std::span<const int64_t> shape,
                  const char* meaning, const Inputs& in) {
  check_same_device(result, in.q);
  check_dtype(result, {dtype});
  check_shape(result, shape, meaning);
  check_writable(result);
  for (const Arg* read : {&in.q, &in.k, &in.v}) check_distinct(result, *read);
}

void check_contiguous(const Arg& arg) {
  int64_t stride = 1;
  for (size_t dim = arg.sizes.size(); dim-- > 0; stride *= arg.sizes[dim]) {
    if (arg.sizes[dim] == 1 || arg.strides[dim] == stride || arg.numel() == 0) continue;
    fail(arg.op, arg.name, "a contiguous tensor", "strides " + shape_text(arg.strides),
         "Pass one, and copy from it");
  }
}

void attention_out(const Tensor& out, const MaybeTensor& lse, const Tensor& q, const Tensor& k,
                   const Tensor& v, const MaybeTensor& kv_indices, const MaybeTensor& schedule,
                   const MaybeTensor& qo_indptr, int64_t flags, int64_t max_q_len,
                   int64_t window_left, const std::optional<double>& sm_scale,
                   const MaybeTensor& kv_indptr, const MaybeTensor& kv_lens, double logits_soft_cap,
                   int64_t pos_encoding_mode, double rope_scale, double rope_theta,
                   bool use_fp16_qk_reduction) {
  constexpr const char* kOp = "attention_out";
  const Inputs in(kOp, q, k, v, qo_indptr, kv_indptr, kv_indices, kv_lens, schedule);
  BatchOptions options = options_of(flags, window_left);
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  options.logits = logit_options(in.q, scale_or_default(sm_scale, of.head_dim_qk), logits_soft_cap,
                                 pos_encoding_mode, rope_scale, rope_theta, use_fp16_qk_reduction);
  const Arg result{kOp, "out", out};
  check_result(result, in.q.dtype, std::array{of.num_tokens, of.num_qo_heads, of.head_dim_vo},
               "[num_tokens, num_qo_heads, head_dim_vo]", in);
  check_last_stride(result);
  check_aligned16(result);
  BatchResults results = {out.mutable_data_ptr(), result.strides[0], result.strides[1], nullptr};
  if (lse) {
    const Arg logs{kOp, "lse", *lse};
    check_result(logs, Dtype::Float, std::array{of.num_tokens, of.num_qo_heads},
                 "[num_tokens, num_qo_heads]", in);
    check_contiguous(logs);
    check_distinct(logs, result);
    results.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  launch_attention(in, of, options, cache, results);
}

}  // namespace

// Why this order and the defaults: an argument that is passed costs the host 0.1 to 0.3 us, one
// left out 0.05 to 0.1. With a work list a call needs the first five or six, and takes
// attention_plain or attention_plain_lse if these are all; the last two, which tell where requests
// begin and end, are in the list already.
static void schemas(Library& m) {
  const std::string plain =
      "Tensor q, Tensor k, Tensor v, Tensor? kv_indices, Tensor? schedule=None, "
      "Tensor? qo_indptr=None, int flags=0";
  const std::string problem = plain +
                              ", SymInt max_q_len=-1, SymInt window_left=-1, "
                              "float? sm_scale=None, Tensor? kv_indptr=None, Tensor? kv_lens=None";
  const std::string options =
      ", float logits_soft_cap=0.0, int pos_encoding_mode=0, float rope_scale=1.0, "
      "float rope_theta=1e4, bool use_fp16_qk_reduction=False";
  const std::string later =
      ", Tensor? custom_mask=None, Tensor? mask_indptr=None, Tensor? q_scale=None, "
      "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? sinks=None, "
      "Tensor[]? extra_tensors=None, float[]? extra_scalars=None";
  m.def(("attention(" + problem + ") -> Tensor").c_str());
  m.def(("attention_plain(" + plain + ") -> Tensor").c_str());
  m.def(("attention_lse(" + problem + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_plain_lse(" + plain + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_full(" + problem + options + later + ") -> (Tensor, Tensor)").c_str());
  m.def(
      ("attention_out(Tensor(a!) out, Tensor(b!)? lse, " + problem + options + ") -> ()").c_str());
  m.def(
      "attention_schedule(Tensor? qo_indptr, Tensor? kv_indptr, Tensor? kv_lens, int flags, "
      "SymInt page_size, SymInt num_qo_tokens, SymInt num_qo_heads, SymInt num_kv_heads, "
      "SymInt head_dim_qk, SymInt head_dim_vo, SymInt max_q_len, SymInt window_left) -> Tensor");
}

static void kernels(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_plain", TORCH_BOX(&attention_plain));
  m.impl("attention_lse", TORCH_BOX(&attention_lse));
  m.impl("attention_plain_lse", TORCH_BOX(&attention_plain_lse));
  m.impl("attention_full", TORCH_BOX(&attention_full));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("attention_schedule", TORCH_BOX(&attention_schedule));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
