// sample, chain_speculative_sampling: schemas, checks, choice of kernel, launch; and the family's
// rows of the core table.

#include "ops/sampling.h"

#include "runtime/names.h"
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr const char* kSegments = "sampling/row_segments.cuh:row_segments";
constexpr const char* kCandidates = "sampling/collect_candidates.cuh:collect_candidates";
constexpr const char* kHistograms = "sampling/collect_candidates.cuh:collect_histograms";
constexpr const char* kFindBetween = "sampling/find_between.cuh:find_between";
constexpr const char* kListBetween = "sampling/list_between.cuh:list_between";
constexpr const char* kDraw = "sampling/draw.cuh:draw";
constexpr const char* kDrawPlain = "sampling/draw_plain.cuh:draw_plain";
constexpr const char* kFindCut = "sampling/find_cut.cuh:find_cut";
constexpr const char* kApplyCut = "sampling/apply_cut.cuh:apply_cut";
constexpr const char* kTopK = "sampling/top_k.cuh:top_k";
constexpr const char* kGather = "sampling/gather_top_k.cuh:gather_top_k";
constexpr const char* kSoftmax = "sampling/softmax.cuh:softmax";
constexpr const char* kSoftmaxSlices = "sampling/softmax.cuh:softmax_slices";
constexpr const char* kSoftmaxClusters = "sampling/softmax_sm90.cuh:softmax_sm90";
constexpr const char* kChain = "sampling/chain_speculative_sampling.cuh:chain_speculative_sampling";

constexpr std::array kLogitsKinds{RowKind::HalfLogits, RowKind::BFloat16Logits,
                                  RowKind::FloatLogits};

// What one op launches for rows of one kind that allow wide accesses, in launch order.
std::vector<std::string> kernels_of(const std::string& op, RowKind kind) {
  const int vec = wide_vec(kind);
  const std::string collect = kind_kernel(kCandidates, kind, vec);
  const std::string cut = kind_kernel(kFindCut, kind);
  static constexpr std::array kTypes{"__half", "__nv_bfloat16", "float", "float"};
  const char* type = kTypes[static_cast<size_t>(kind)];
  if (op == "sample") {
    return {collect,
            kind_kernel(kFindBetween, kind),
            kind_kernel(kListBetween, kind, vec),
            kind_kernel(kDraw, kind),
            kind_kernel(kSegments, kind, vec),
            kind_kernel(kDrawPlain, kind)};
  }
  if (op == "top_k") return {collect, kind_kernel(kTopK, kind), cut, kernel_name(kGather, type)};
  if (op == "softmax") {
    return {kernel_name(kSoftmax, type, kSoftmaxVec), kind_kernel(kSegments, kind, vec),
            kernel_name(kSoftmaxSlices, type, kSoftmaxVec)};
  }
  const std::string apply = kind_kernel(kApplyCut, kind, vec);
  if (op == "top_k_mask_logits") return {collect, cut, apply};
  return {collect,
          kind_kernel(kHistograms, kind, vec),
          kind_kernel(kFindBetween, kind),
          kind_kernel(kListBetween, kind, vec),
          cut,
          apply,
          kind_kernel(kSegments, kind, vec)};
}

std::string cluster_kernel(RowKind kind) {
  static constexpr std::array kTypes{"__half", "__nv_bfloat16", "float"};
  return kernel_name(kSoftmaxClusters, kTypes[static_cast<size_t>(kind)], kSoftmaxVec);
}

const std::vector<std::string>& family_ops() {
  static const std::vector<std::string> ops{"sample",
                                            "softmax",
                                            "top_k",
                                            "top_k_mask_logits",
                                            "top_k_renorm_probs",
                                            "top_p_renorm_probs",
                                            "chain_speculative_sampling"};
  return ops;
}

std::vector<RowKind> kinds_of(const std::string& op) {
  if (op == "top_k_renorm_probs" || op == "top_p_renorm_probs") return {RowKind::Probs};
  std::vector<RowKind> kinds(kLogitsKinds.begin(), kLogitsKinds.end());
  if (op == "sample") kinds.push_back(RowKind::Probs);
  return kinds;
}

int block_of(const std::string& kernel) {
  if (kernel.find("row_segments") != std::string::npos ||
      kernel.find("collect_") != std::string::npos ||
      kernel.find("list_between") != std::string::npos ||
      kernel.find("apply_cut") != std::string::npos ||
      kernel.find("draw_plain") != std::string::npos ||
      kernel.find("softmax_slices") != std::string::npos) {
    return kCollectThreads;
  }
  return kernel.find("softmax") != std::string::npos ? kSoftmaxThreads : kRowThreads;
}

std::vector<Row> sampling_rows() {
  std::vector<Row> rows;
  for (const std::string& op : family_ops()) {
    if (op == "chain_speculative_sampling") {
      rows.push_back(
          {.op = op, .kernel = kChain, .block = kRowThreads, .why = "a block a request"});
      continue;
    }
    for (const RowKind kind : kinds_of(op)) {
      if (op == "softmax") {
        rows.push_back({.op = op,
                        .kernel = cluster_kernel(kind),
                        .min_sm = 90,
                        .block = kClusterThreads,
                        .why = "a row in the registers of a cluster"});
      }
      for (const std::string& name : kernels_of(op, kind)) {
        rows.push_back(
            {.op = op, .kernel = name, .block = block_of(name), .why = "rows of 16-byte accesses"});
      }
    }
  }
  return rows;
}

Choice sampling_choose(const std::string& op, const Config& config, int sm) {
  if (op == "chain_speculative_sampling") return {{kChain}, {}};
  const std::string dtype = config.get("dtype", "float32");
  const bool probs = config.get("from", "logits") == "probs" || kinds_of(op).size() == 1;
  if (probs && dtype != "float32") return {{}, {"dtype " + dtype + ": expected float32"}};
  if (probs) return {kernels_of(op, RowKind::Probs), {}};
  for (const RowKind kind : kLogitsKinds) {
    static constexpr std::array kDtypes{"float16", "bfloat16", "float32"};
    if (dtype != kDtypes[static_cast<size_t>(kind)]) continue;
    if (op == "softmax" && sm >= 90) return {{cluster_kernel(kind)}, {}};
    return {kernels_of(op, kind), {}};
  }
  return {{}, {"dtype " + dtype + ": expected float16, bfloat16 or float32"}};
}

const RegisterFamily family({family_ops(), sampling_rows, sampling_choose});

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& input, const Tensor& seed,
                                          const std::optional<Tensor>& offset, bool from_logits,
                                          bool joint, const std::optional<Tensor>& indices,
                                          const std::optional<Tensor>& temperature,
                                          double temperature_val,
                                          const std::optional<Tensor>& top_k, int64_t top_k_val,
                                          const std::optional<Tensor>& top_p, double top_p_val,
                                          const std::optional<Tensor>& min_p, double min_p_val) {
  constexpr const char* kOp = "sample";
  static const KindKernels filtered(kDraw, false), plain(kDrawPlain, false);
  const Arg arg{kOp, from_logits ? "logits" : "probs", input};
  const RowInput rows = from_logits
                            ? row_input(arg, {Dtype::Float, Dtype::Half, Dtype::BFloat16}, indices)
                            : row_input(arg, {Dtype::Float}, indices);
  const int64_t num_rows = rows.num_rows;
  const Filters filters{setting_of({"temperature", temperature, temperature_val}, arg, num_rows),
                        setting_of({"top_p", top_p, top_p_val}, arg, num_rows),
                        setting_of({"min_p", min_p, min_p_val}, arg, num_rows),
                        integer_of({"top_k", top_k, top_k_val}, arg, num_rows), joint};
  const RandomKeys keys = keys_of(kOp, seed, offset, arg, num_rows);
  const Tensor tokens = empty(input, {num_rows}, Dtype::Int);
  const Tensor valid = empty(input, {num_rows}, Dtype::Bool);
  const Tensor log_probs = empty(input, {num_rows}, Dtype::Float);
  if (num_rows == 0) return {tokens, valid, log_probs};

  const RowKind kind = from_logits ? logits_kind(dtype_of(input)) : RowKind::Probs;
  const Lists lists = lists_for(filters, rows.vocab);
  const RowScratch scratch(input, rows, lists);
  const Device& gpu = device(input.get_device_index());
  launch_collect(gpu, kind, input, {rows, filters, scratch.get(), true});
  const DrawParams params{rows,
                          filters,
                          scratch.get(),
                          keys,
                          static_cast<int32*>(tokens.mutable_data_ptr()),
                          static_cast<uint8*>(valid.mutable_data_ptr()),
                          static_cast<float*>(log_probs.mutable_data_ptr())};
  const bool is_plain = lists == Lists::None;
  launch((is_plain ? plain : filtered).of(kind), gpu,
         {.grid_x = rows.num_rows,
          .block = is_plain ? kPlainThreads : kRowThreads,
          .pdl = gpu.sm >= 90},
         &params);
  return {tokens, valid, log_probs};
}

void check_chain(const Arg& draft, const Arg& tokens, const Arg& target) {
  check_cuda(draft);
  check_dtype(draft, {Dtype::Float});
  check_rank(draft, {3});
  check_last_stride(draft);
  const int64_t batch = draft.tensor.size(0), num_draft = draft.tensor.size(1);
  const int64_t vocab = draft.tensor.size(2);
  if (vocab < 1 || vocab > (int64_t{1} << 21)) {
    fail(draft.op, draft.name, "a vocabulary of 1 to 2097152", shape_text(draft.tensor),
         "Split the vocabulary");
  }
  check_same_device(tokens, draft);
  check_dtype(tokens, {Dtype::Int, Dtype::Long});
  check_shape(tokens, std::array{batch, num_draft}, "[batch_size, num_speculative_tokens]");
  check_same_device(target, draft);
  check_dtype(target, {Dtype::Float});
  check_shape(target, std::array{batch, num_draft + 1, vocab},
              "[batch_size, num_speculative_tokens + 1, vocab_size]");
  check_last_stride(target);
}

std::tuple<Tensor, Tensor, Tensor> chain_speculative_sampling(const Tensor& draft_probs,
                                                              const Tensor& draft_token_ids,
                                                              const Tensor& target_probs,
                                                              const Tensor& seed,
                                                              const std::optional<Tensor>& offset) {
  constexpr const char* kOp = "chain_speculative_sampling";
  static Kernel& chain = kernel(kChain);
  const Arg draft{kOp, "draft_probs", draft_probs};
  check_chain(draft, {kOp, "draft_token_ids", draft_token_ids},
              {kOp, "target_probs", target_probs});
  const int64_t batch = draft_probs.size(0), num_draft = draft_probs.size(1);
  const auto vocab = static_cast<uint32>(draft_probs.size(2));
  const RandomKeys keys = keys_of(kOp, seed, offset, draft, batch);
  const Tensor tokens = empty(draft_probs, {batch, num_draft + 1}, Dtype::Int);
  const Tensor accepted = empty(draft_probs, {batch}, Dtype::Int);
  const Tensor emitted = empty(draft_probs, {batch}, Dtype::Int);
  if (batch == 0) return {tokens, accepted, emitted};
  const ChainParams params{.draft_probs = static_cast<const float*>(draft_probs.const_data_ptr()),
                           .draft_tokens = draft_token_ids.const_data_ptr(),
                           .target_probs = static_cast<const float*>(target_probs.const_data_ptr()),
                           .draft_strides = {draft_probs.stride(0), draft_probs.stride(1)},
                           .token_strides = {draft_token_ids.stride(0), draft_token_ids.stride(1)},
                           .target_strides = {target_probs.stride(0), target_probs.stride(1)},
                           .keys = keys,
                           .tokens = static_cast<int32*>(tokens.mutable_data_ptr()),
                           .accepted = static_cast<int32*>(accepted.mutable_data_ptr()),
                           .emitted = static_cast<int32*>(emitted.mutable_data_ptr()),
                           .num_draft = static_cast<uint32>(num_draft),
                           .vocab = vocab,
                           .index_bits = index_bits_of(vocab),
                           .wide_tokens = dtype_of(draft_token_ids) == Dtype::Long};
  launch(chain, device(draft_probs.get_device_index()),
         {.grid_x = static_cast<unsigned>(batch), .block = kRowThreads}, &params);
  return {tokens, accepted, emitted};
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "sample(Tensor input, Tensor seed, Tensor? offset, bool from_logits, bool joint, "
      "Tensor? indices, Tensor? temperature, float temperature_val, Tensor? top_k, "
      "SymInt top_k_val, Tensor? top_p, float top_p_val, Tensor? min_p, float min_p_val) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "chain_speculative_sampling(Tensor draft_probs, Tensor draft_token_ids, "
      "Tensor target_probs, Tensor seed, Tensor? offset) -> (Tensor, Tensor, Tensor)");
}

static void kernels(Library& m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("chain_speculative_sampling", TORCH_BOX(&chain_speculative_sampling));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
