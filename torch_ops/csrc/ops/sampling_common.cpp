// Checks, kernels and scratch memory of the sampling ops.

#include "ops/sampling.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "runtime/access.h"
#include "runtime/names.h"

namespace ridgeline {
namespace {

constexpr std::array kKindNames{"Logits<__half>", "Logits<__nv_bfloat16>", "Logits<float>",
                                "Probs"};
constexpr int64_t kMaxVocab = int64_t{1} << 21;  // sums of so many masses fit 63 bits
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// A vector of one element a row, or of one for all.
int64_t per_row_stride(const Arg& arg, const Arg& input, int64_t num_rows) {
  check_same_device(arg, input);
  check_rank(arg, {1});
  if (arg.tensor.size(0) == num_rows) return num_rows == 1 ? 0 : arg.tensor.stride(0);
  if (arg.tensor.size(0) == 1) return 0;
  fail(arg.op, arg.name, "shape [" + std::to_string(num_rows) + "] = one value a row, or [1]",
       shape_text(arg.tensor), "Pass a tensor of that shape");
}

// As many slices a block as leave one block for every place on the GPU, or, with more rows than
// places, several for each, so that the last ones make no wave of their own.
uint32 slices_per_part(const Device& gpu, const RowInput& input, Lists lists) {
  constexpr uint32 kWaves = 4;
  const uint32 blocks_per_sm = gpu.sm >= 90 && lists == Lists::Candidates ? 4 : 3;
  const uint32 places = static_cast<uint32>(gpu.num_sms) * blocks_per_sm;
  const uint32 num_slices = num_slices_of(input.vocab);
  const uint32 parts = input.num_rows <= places
                           ? places / input.num_rows
                           : (places * kWaves + input.num_rows - 1) / input.num_rows;
  return std::max(1u, (num_slices + parts - 1) / parts);
}

}  // namespace

RowKind logits_kind(Dtype dtype) {
  return dtype == Dtype::Half       ? RowKind::HalfLogits
         : dtype == Dtype::BFloat16 ? RowKind::BFloat16Logits
                                    : RowKind::FloatLogits;
}

std::string kind_name(RowKind kind) {
  return kKindNames[static_cast<size_t>(kind)];
}

int wide_vec(RowKind kind) {
  return kind == RowKind::HalfLogits || kind == RowKind::BFloat16Logits ? 8 : 4;
}

std::string kind_kernel(const std::string& entry, RowKind kind, int vec_size) {
  return vec_size == 0 ? kernel_name(entry, kind_name(kind))
                       : kernel_name(entry, kind_name(kind), vec_size);
}

KindKernels::KindKernels(const std::string& entry, bool has_widths) {
  for (size_t i = 0; i < kKindNames.size(); ++i) {
    const auto kind = static_cast<RowKind>(i);
    wide_[i] = &kernel(kind_kernel(entry, kind, has_widths ? wide_vec(kind) : 0));
    narrow_[i] = has_widths ? &kernel(kind_kernel(entry, kind, 1)) : wide_[i];
  }
}

Kernel& KindKernels::of(RowKind kind, int vec_size) const {
  return *(vec_size == 1 ? narrow_ : wide_)[static_cast<size_t>(kind)];
}

Setting setting_of(const RowValue& value, const Arg& input, int64_t num_rows) {
  if (!value.tensor) {
    if (!std::isfinite(value.value) || value.value < 0) {
      fail(input.op, value.name, "a finite number >= 0", std::to_string(value.value),
           "Leave it out to switch it off");
    }
    return {nullptr, 0, value.value};
  }
  const Arg arg{input.op, value.name, *value.tensor};
  const int64_t stride = per_row_stride(arg, input, num_rows);
  check_dtype(arg, {Dtype::Float});
  return {static_cast<const float*>(value.tensor->const_data_ptr()), stride, 0.0};
}

IntSetting integer_of(const RowInteger& value, const Arg& input, int64_t num_rows) {
  if (!value.tensor) return {nullptr, 0, value.value, 0};
  const Arg arg{input.op, value.name, *value.tensor};
  const int64_t stride = per_row_stride(arg, input, num_rows);
  check_dtype(arg, {Dtype::Int, Dtype::Long});
  return {value.tensor->const_data_ptr(), stride, 0, dtype_of(*value.tensor) == Dtype::Long};
}

RandomKeys keys_of(const char* op, const Tensor& seed, const std::optional<Tensor>& offset,
                   const Arg& input, int64_t num_rows) {
  RandomKeys keys{};
  const Arg seed_arg{op, "seed", seed};
  keys.seed_stride = per_row_stride(seed_arg, input, num_rows);
  check_dtype(seed_arg, {Dtype::Long});
  keys.seeds = static_cast<const int64*>(seed.const_data_ptr());
  if (offset) {
    const Arg offset_arg{op, "offset", *offset};
    keys.offset_stride = per_row_stride(offset_arg, input, num_rows);
    check_dtype(offset_arg, {Dtype::Long});
    keys.offsets = static_cast<const int64*>(offset->const_data_ptr());
  }
  return keys;
}

uint32 index_bits_of(uint32 vocab) {
  return static_cast<uint32>(std::bit_width(vocab - 1));
}

RowInput row_input(const Arg& input, std::initializer_list<Dtype> dtypes,
                   const std::optional<Tensor>& indices) {
  check_cuda(input);
  check_dtype(input, dtypes);
  check_rank(input, {2});
  check_last_stride(input);
  const int64_t num_inputs = input.tensor.size(0), vocab = input.tensor.size(1);
  if (vocab < 1 || vocab > kMaxVocab) {
    fail(input.op, input.name, "a vocabulary of 1 to " + std::to_string(kMaxVocab),
         shape_text(input.tensor), "Split the vocabulary");
  }
  int64_t num_rows = num_inputs;
  IntSetting selected{};
  if (indices) {
    const Arg arg{input.op, "indices", *indices};
    check_same_device(arg, input);
    check_dtype(arg, {Dtype::Int, Dtype::Long});
    check_rank(arg, {1});
    num_rows = indices->size(0);
    selected = {indices->const_data_ptr(), indices->stride(0), 0,
                dtype_of(*indices) == Dtype::Long};
    if (num_inputs == 0 && num_rows > 0) {
      fail(input.op, input.name, "at least one row, since 'indices' selects some",
           shape_text(input.tensor), "Pass empty indices with an empty batch");
    }
  }
  if (num_rows * num_slices_of(static_cast<uint32>(vocab)) > kMaxBlocks) {
    fail(input.op, input.name, "fewer rows", std::to_string(num_rows), "Split the call");
  }
  return {input.tensor.const_data_ptr(),
          input.tensor.stride(0),
          selected,
          static_cast<uint32>(num_inputs),
          static_cast<uint32>(num_rows),
          static_cast<uint32>(vocab),
          index_bits_of(static_cast<uint32>(vocab))};
}

RowScratch::RowScratch(const Tensor& like, const RowInput& input, Lists lists) {
  const Device& gpu = device(like.get_device_index());
  const size_t rows = input.num_rows;
  const size_t segments = rows * num_segments_of(input.vocab);
  scratch_ = {};
  scratch_.slices_per_part = slices_per_part(gpu, input, lists);
  scratch_.num_parts =
      (num_slices_of(input.vocab) + scratch_.slices_per_part - 1) / scratch_.slices_per_part;
  const size_t parts = rows * scratch_.num_parts;
  size_t size = 0;
  // Why lines of their own: a kernel that starts before another ends finds in L1 what that one has
  // read, and with it what lies next to it.
  constexpr size_t kLine = 128;
  const auto place = [&](bool wanted, size_t bytes) {
    const size_t at = size;
    size += wanted ? (bytes + kLine - 1) / kLine * kLine : 0;
    return at;
  };
  const bool collects = lists != Lists::None, counts = lists == Lists::Histograms;
  const size_t segments_at = place(true, segments * sizeof(SegmentStats));
  const size_t cuts_at = place(true, rows * sizeof(RowCut));
  const size_t parts_at = place(collects, parts * sizeof(PartInfo));
  scratch_.row_capacity =
      (counts ? num_slices_of(input.vocab) : scratch_.num_parts) * kPartCapacity;
  const size_t lists_at = place(collects, rows * scratch_.row_capacity * sizeof(uint64));
  const size_t histograms_at = place(counts, parts * kWeightBins * sizeof(uint32));
  const size_t references_at = place(counts, rows * sizeof(float));
  const size_t between_at = place(counts, rows * sizeof(Between));
  const size_t kept_at = place(counts, segments * sizeof(uint64));
  memory_ = empty(like, {static_cast<int64_t>(size)}, Dtype::Byte);
  auto* memory = static_cast<uint8*>(memory_.mutable_data_ptr());
  scratch_.segments = reinterpret_cast<SegmentStats*>(memory + segments_at);
  scratch_.cuts = reinterpret_cast<RowCut*>(memory + cuts_at);
  if (collects) {
    scratch_.parts = reinterpret_cast<PartInfo*>(memory + parts_at);
    scratch_.candidates = reinterpret_cast<uint64*>(memory + lists_at);
  }
  if (counts) {
    scratch_.histograms = reinterpret_cast<uint32*>(memory + histograms_at);
    scratch_.references = reinterpret_cast<float*>(memory + references_at);
    scratch_.between = reinterpret_cast<Between*>(memory + between_at);
    scratch_.kept = reinterpret_cast<uint64*>(memory + kept_at);
  }
}

unsigned num_slice_blocks(const RowInput& input) {
  return input.num_rows * num_slices_of(input.vocab);
}

void launch_collect(const Device& gpu, RowKind kind, const Tensor& input,
                    const CollectParams& how) {
  static const KindKernels segments("sampling/row_segments.cuh:row_segments", true);
  static const KindKernels candidates("sampling/collect_candidates.cuh:collect_candidates", true);
  static const KindKernels histograms("sampling/collect_candidates.cuh:collect_histograms", true);
  static const KindKernels find_bins("sampling/find_between.cuh:find_between", false);
  static const KindKernels list_bins("sampling/list_between.cuh:list_between", true);
  const Scratch& scratch = how.scratch;
  const int width = access_width({&input}, {input.size(1)});
  if (!scratch.parts) {
    launch(segments.of(kind, width), gpu,
           {.grid_x = num_slice_blocks(how.input), .block = kCollectThreads}, &how);
    return;
  }
  const unsigned num_blocks = how.input.num_rows * scratch.num_parts;
  const KindKernels& collect = scratch.histograms ? histograms : candidates;
  launch(collect.of(kind, width), gpu, {.grid_x = num_blocks, .block = kCollectThreads}, &how);
  if (!scratch.histograms) return;
  const bool pdl = gpu.sm >= 90;
  const NarrowParams narrow{how.input, how.filters, scratch};
  launch(find_bins.of(kind), gpu, {.grid_x = how.input.num_rows, .block = kRowThreads, .pdl = pdl},
         &narrow);
  launch(list_bins.of(kind, width), gpu,
         {.grid_x = num_blocks, .block = kCollectThreads, .pdl = pdl}, &narrow);
}

Lists lists_for(const Filters& filters, uint32 vocab) {
  const IntSetting& k = filters.top_k;
  const bool greedy = !filters.temperature.values && !(filters.temperature.value > 0);
  if (greedy) return Lists::None;
  const bool limits = k.value > 0 && k.value < vocab;
  if (!k.values && limits && k.value <= kMaxCollectedK) return Lists::Candidates;
  const bool shares = filters.top_p.values || filters.top_p.value < 1 || filters.min_p.values ||
                      filters.min_p.value > 0;
  return k.values || limits || shares ? Lists::Histograms : Lists::None;
}

Filters no_filters() {
  Filters filters{};
  filters.temperature.value = 1.0;
  filters.top_p.value = 1.0;
  return filters;
}

}  // namespace ridgeline
