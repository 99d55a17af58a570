// softmax, top_k_renorm_probs, top_p_renorm_probs, top_k_mask_logits, top_k: schemas, checks,
// choice of kernel, launch.

#include <algorithm>
#include <array>
#include <bit>

#include "ops/sampling.h"
#include "runtime/access.h"
#include "runtime/names.h"
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr uint32 kMaxSoftmaxSegments = 320;  // kMaxSegmentsInSmem of softmax.cuh
constexpr uint32 kMinSoftmaxSegments = 16;   // a shorter row leaves most of a block idle
constexpr int kSoftmaxStaticSmem = 6144;
constexpr std::initializer_list<Dtype> kLogitsDtypes{Dtype::Float, Dtype::Half, Dtype::BFloat16};

struct SoftmaxKernels {
  std::array<Kernel*, 3> rows, clusters, wide_slices, narrow_slices;

  SoftmaxKernels() {
    constexpr std::array kTypes{"__half", "__nv_bfloat16", "float"};
    for (size_t i = 0; i < rows.size(); ++i) {
      const std::string slices = "sampling/softmax.cuh:softmax_slices";
      const std::string in_clusters = "sampling/softmax_sm90.cuh:softmax_sm90";
      clusters[i] = &kernel(kernel_name(in_clusters, kTypes[i], kSoftmaxVec));
      rows[i] = &kernel(kernel_name("sampling/softmax.cuh:softmax", kTypes[i], kSoftmaxVec));
      wide_slices[i] = &kernel(kernel_name(slices, kTypes[i], kSoftmaxVec));
      narrow_slices[i] = &kernel(kernel_name(slices, kTypes[i], 1));
    }
  }
};

Tensor softmax(const Tensor& logits, const std::optional<Tensor>& temperature,
               double temperature_val) {
  static const SoftmaxKernels kernels;
  const Arg arg{"softmax", "logits", logits};
  const RowInput rows = row_input(arg, kLogitsDtypes, std::nullopt);
  Filters filters = no_filters();
  filters.temperature =
      setting_of({"temperature", temperature, temperature_val}, arg, rows.num_rows);
  const Tensor output = empty(logits, {logits.size(0), logits.size(1)}, Dtype::Float);
  if (rows.num_rows == 0) return output;

  const RowKind kind = logits_kind(dtype_of(logits));
  const auto idx = static_cast<size_t>(kind);
  const Device& gpu = device(logits.get_device_index());
  const bool wide = access_width({&logits}, {logits.size(1)}) > 1;
  const uint32 num_segments = num_segments_of(rows.vocab);
  SoftmaxParams params{rows, filters.temperature, nullptr,
                       static_cast<float*>(output.mutable_data_ptr()), 0};
  const uint32 cluster = std::bit_ceil((num_segments + kClusterSegments - 1) / kClusterSegments);
  if (wide && gpu.sm >= 90 && cluster <= kMaxCluster) {
    const auto bytes = kClusterSegments * kSegmentSize * element_size(dtype_of(logits));
    Launch how{
        .block = kClusterThreads, .dynamic_smem = static_cast<unsigned>(bytes), .cluster = cluster};
    how.grid_x =
        std::min(rows.num_rows, resident_clusters(*kernels.clusters[idx], gpu, how)) * cluster;
    launch(*kernels.clusters[idx], gpu, how, &params);
    return output;
  }
  // With many rows a block each keeps every SM busy, and reads memory once.
  if (wide && num_segments >= kMinSoftmaxSegments && num_segments <= kMaxSoftmaxSegments &&
      rows.num_rows * 3 >= static_cast<uint32>(gpu.num_sms) * 2) {
    const int bytes_of_segment = kSegmentSize * sizeof(float);
    const int room = std::max(gpu.max_dynamic_smem - kSoftmaxStaticSmem, 0) / bytes_of_segment;
    params.num_held = std::min(num_segments, static_cast<uint32>(room));
    launch(*kernels.rows[idx], gpu,
           {.grid_x = rows.num_rows,
            .block = kSoftmaxThreads,
            .dynamic_smem = params.num_held * bytes_of_segment},
           &params);
    return output;
  }
  const RowScratch scratch(logits, rows, Lists::None);
  params.segments = scratch.get().segments;
  launch_collect(gpu, kind, logits, {rows, filters, scratch.get(), false});
  launch(*(wide ? kernels.wide_slices : kernels.narrow_slices)[idx], gpu,
         {.grid_x = num_slice_blocks(rows), .block = kCollectThreads, .pdl = gpu.sm >= 90},
         &params);
  return output;
}

// The launches that find every row's threshold.
void find_cuts(const Device& gpu, RowKind kind, const Tensor& input, const RowInput& rows,
               const Filters& filters, bool count_only, const Scratch& scratch) {
  static const KindKernels kernels("sampling/find_cut.cuh:find_cut", false);
  launch_collect(gpu, kind, input, {rows, filters, scratch, false});
  const CutParams params{rows, filters, scratch, count_only};
  launch(kernels.of(kind), gpu,
         {.grid_x = rows.num_rows, .block = kRowThreads, .pdl = gpu.sm >= 90}, &params);
}

// A new tensor of what the filters keep of `input`.
Tensor filtered(RowKind kind, const Tensor& input, const RowInput& rows, const Filters& filters,
                bool count_only) {
  static const KindKernels kernels("sampling/apply_cut.cuh:apply_cut", true);
  const Tensor output = empty_like(input);
  if (rows.num_rows == 0) return output;
  const Device& gpu = device(input.get_device_index());
  const Lists lists = count_only ? Lists::Candidates : lists_for(filters, rows.vocab);
  const RowScratch scratch(input, rows, lists);
  find_cuts(gpu, kind, input, rows, filters, count_only, scratch.get());
  const ApplyParams params{rows, scratch.get().cuts, scratch.get().segments,
                           output.mutable_data_ptr()};
  launch(kernels.of(kind, access_width({&input, &output}, {input.size(1)})), gpu,
         {.grid_x = num_slice_blocks(rows), .block = kCollectThreads, .pdl = gpu.sm >= 90},
         &params);
  return output;
}

Tensor top_p_renorm_probs(const Tensor& probs, const std::optional<Tensor>& top_p,
                          double top_p_val) {
  const Arg arg{"top_p_renorm_probs", "probs", probs};
  const RowInput rows = row_input(arg, {Dtype::Float}, std::nullopt);
  Filters filters = no_filters();
  filters.top_p = setting_of({"top_p", top_p, top_p_val}, arg, rows.num_rows);
  return filtered(RowKind::Probs, probs, rows, filters, false);
}

Tensor top_k_renorm_probs(const Tensor& probs, const std::optional<Tensor>& top_k,
                          int64_t top_k_val) {
  const Arg arg{"top_k_renorm_probs", "probs", probs};
  const RowInput rows = row_input(arg, {Dtype::Float}, std::nullopt);
  Filters filters = no_filters();
  filters.top_k = integer_of({"top_k", top_k, top_k_val}, arg, rows.num_rows);
  return filtered(RowKind::Probs, probs, rows, filters, false);
}

Tensor top_k_mask_logits(const Tensor& logits, const std::optional<Tensor>& top_k,
                         int64_t top_k_val) {
  const Arg arg{"top_k_mask_logits", "logits", logits};
  const RowInput rows = row_input(arg, kLogitsDtypes, std::nullopt);
  Filters filters = no_filters();
  filters.top_k = integer_of({"top_k", top_k, top_k_val}, arg, rows.num_rows);
  return filtered(logits_kind(dtype_of(logits)), logits, rows, filters, true);
}

struct GatherKernels {
  std::array<Kernel*, 3> kernels;
  GatherKernels() {
    constexpr std::array kTypes{"__half", "__nv_bfloat16", "float"};
    for (size_t i = 0; i < kernels.size(); ++i) {
      kernels[i] = &kernel(kernel_name("sampling/gather_top_k.cuh:gather_top_k", kTypes[i]));
    }
  }
};

void check_top_k(const RowInput& rows, int64_t k, bool sorted) {
  if (k < 1 || k > rows.vocab) {
    fail("top_k", "k", "1 to " + std::to_string(rows.vocab) + " (the size of a row)",
         std::to_string(k), "Pass min(k, input.shape[1])");
  }
  if (sorted && k > kMaxCollectedK) {
    fail("top_k", "k", "at most " + std::to_string(kMaxCollectedK) + " where 'sorted' is true",
         std::to_string(k), "Call ridgeline.top_k, which sorts more of them");
  }
}

std::tuple<Tensor, Tensor> top_k(const Tensor& input, int64_t k, bool sorted) {
  static const KindKernels few("sampling/top_k.cuh:top_k", false);
  static const GatherKernels gather;
  const Arg arg{"top_k", "input", input};
  const RowInput rows = row_input(arg, kLogitsDtypes, std::nullopt);
  check_top_k(rows, k, sorted);
  const Tensor values = empty(input, {input.size(0), k}, dtype_of(input));
  const Tensor indices = empty(input, {input.size(0), k}, Dtype::Long);
  if (rows.num_rows == 0) return {values, indices};
  const RowKind kind = logits_kind(dtype_of(input));
  const Device& gpu = device(input.get_device_index());
  const RowScratch scratch(input, rows, Lists::Candidates);
  Filters filters = no_filters();
  filters.top_k.value = k;
  const Launch how{.grid_x = rows.num_rows, .block = kRowThreads, .pdl = gpu.sm >= 90};
  auto* to = static_cast<int64*>(indices.mutable_data_ptr());
  if (k <= kMaxCollectedK) {
    launch_collect(gpu, kind, input, {rows, filters, scratch.get(), false});
    const TopKParams params{rows, scratch.get(),          values.mutable_data_ptr(),
                            to,   static_cast<uint32>(k), sorted};
    launch(few.of(kind), gpu, how, &params);
    return {values, indices};
  }
  find_cuts(gpu, kind, input, rows, filters, true, scratch.get());
  const GatherParams params{rows, scratch.get().cuts, values.mutable_data_ptr(), to,
                            static_cast<uint32>(k)};
  launch(*gather.kernels[static_cast<size_t>(kind)], gpu, how, &params);
  return {values, indices};
}

}  // namespace

static void schemas(Library& m) {
  m.def("softmax(Tensor logits, Tensor? temperature, float temperature_val) -> Tensor");
  m.def("top_p_renorm_probs(Tensor probs, Tensor? top_p, float top_p_val) -> Tensor");
  m.def("top_k_renorm_probs(Tensor probs, Tensor? top_k, SymInt top_k_val) -> Tensor");
  m.def("top_k_mask_logits(Tensor logits, Tensor? top_k, SymInt top_k_val) -> Tensor");
  m.def("top_k(Tensor input, SymInt k, bool sorted) -> (Tensor, Tensor)");
}

static void kernels(Library& m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("top_p_renorm_probs", TORCH_BOX(&top_p_renorm_probs));
  m.impl("top_k_renorm_probs", TORCH_BOX(&top_k_renorm_probs));
  m.impl("top_k_mask_logits", TORCH_BOX(&top_k_mask_logits));
  m.impl("top_k", TORCH_BOX(&top_k));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
