// merge_state, merge_state_in_place, merge_states: schemas, checks, choice of kernel, launch.

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention/merge_params.h"
#include "runtime/access.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

constexpr const char* kMergeState = "attention/merge_state.cuh:merge_state";
constexpr const char* kMergeStates = "attention/merge_states.cuh:merge_states";

const char* entry_of(const std::string& op) {
  return op == "merge_states" ? kMergeStates : kMergeState;
}

auto merge_name(const char* entry) {
  return [=](const Access& access) {
    return kernel_name(entry, device_type(access.dtype), access.vec_size);
  };
}

std::vector<Row> merge_rows() {
  std::vector<Row> rows;
  for (const char* op : {"merge_state", "merge_state_in_place", "merge_states"}) {
    add_access_rows(rows, op, merge_name(entry_of(op)), kMergeThreads);
  }
  return rows;
}

Choice merge_choose(const std::string& op, const Config& config, int) {
  return choose_access(config, merge_name(entry_of(op)));
}

const RegisterFamily family({{"merge_state", "merge_state_in_place", "merge_states"},
                             merge_rows,
                             merge_choose});

void check_values(const Arg& v, int64_t rank) {
  check_cuda(v);
  check_dtype(v, {Dtype::Half, Dtype::BFloat16, Dtype::Float});
  check_rank(v, {rank});
  check_last_stride(v);
}

void check_lse(const Arg& s, const Arg& v, const char* meaning) {
  check_same_device(s, v);
  check_dtype(s, {Dtype::Float});
  const auto sizes = v.tensor.sizes();
  check_shape(s, {sizes.data(), sizes.size() - 1}, meaning);
}

// The states (v, s) and (v_other, s_other) of one shape.
void check_pair(const Arg& v, const Arg& s, const Arg& v_other, const Arg& s_other) {
  check_values(v, 3);
  check_lse(s, v, "[seq_len, num_heads]");
  check_same_device(v_other, v);
  check_same_dtype(v_other, v);
  const auto sizes = v.tensor.sizes();
  check_shape(v_other, {sizes.data(), sizes.size()}, "that of the first state");
  check_last_stride(v_other);
  check_lse(s_other, v, "[seq_len, num_heads]");
}

MergeShape merge_shape(const Arg& v, int64_t num_heads, int vec_size) {
  const Tensor& tensor = v.tensor;
  const int64_t num_rows = tensor.size(0) * num_heads;
  if (num_rows > kMaxRows) {
    fail(v.op, v.name, "fewer than 2^31 heads of tokens", std::to_string(num_rows),
         "Split the call");
  }
  const auto num_vecs = static_cast<uint32>(tensor.size(tensor.dim() - 1) / vec_size);
  return {static_cast<uint32>(num_rows), make_divider(static_cast<uint32>(num_heads)), num_vecs,
          merge_lanes(num_vecs)};
}

MergeStrides strides_of(const Tensor& tensor, int64_t head_dim_idx) {
  return {tensor.stride(0), tensor.stride(head_dim_idx)};
}

void launch_merge(const AccessKernels& kernels, const Tensor& v, int vec_size,
                  const MergeShape& shape, const void* params) {
  launch(kernels.of(v.scalar_type(), vec_size), device(v.get_device_index()),
         {.grid_x = merge_blocks(shape), .block = kMergeThreads}, params);
}

void run_merge_state(const Arg& v_a, const Tensor& s_a, const Tensor& v_b, const Tensor& s_b,
                     const Tensor& v, const Tensor& s, const Tensor* mask) {
  static const AccessKernels kernels(merge_name(kMergeState));
  const int64_t num_heads = v.size(1);
  if (v.size(0) == 0 || num_heads == 0) return;
  const int vec_size = access_width({&v, &v_a.tensor, &v_b}, {v.size(2)});
  const MergeStateParams params{
      .v_a = v_a.tensor.const_data_ptr(),
      .s_a = static_cast<const float*>(s_a.const_data_ptr()),
      .v_b = v_b.const_data_ptr(),
      .s_b = static_cast<const float*>(s_b.const_data_ptr()),
      .v = v.mutable_data_ptr(),
      .s = static_cast<float*>(s.mutable_data_ptr()),
      .mask = mask ? static_cast<const uint8*>(mask->const_data_ptr()) : nullptr,
      .mask_stride = mask ? mask->stride(0) : 0,
      .v_a_strides = strides_of(v_a.tensor, 1),
      .s_a_strides = strides_of(s_a, 1),
      .v_b_strides = strides_of(v_b, 1),
      .s_b_strides = strides_of(s_b, 1),
      .v_strides = strides_of(v, 1),
      .s_strides = strides_of(s, 1),
      .shape = merge_shape(v_a, num_heads, vec_size)};
  launch_merge(kernels, v, vec_size, params.shape, &params);
}

std::tuple<Tensor, Tensor> merge_state(const Tensor& v_a, const Tensor& s_a, const Tensor& v_b,
                                       const Tensor& s_b) {
  constexpr const char* kOp = "merge_state";
  const Arg first{kOp, "v_a", v_a};
  check_pair(first, {kOp, "s_a", s_a}, {kOp, "v_b", v_b}, {kOp, "s_b", s_b});
  const Tensor v = empty_like(v_a);
  const Tensor s = empty_like(s_a);
  run_merge_state(first, s_a, v_b, s_b, v, s, nullptr);
  return {v, s};
}

void merge_state_in_place(const Tensor& v, const Tensor& s, const Tensor& v_other,
                          const Tensor& s_other, const std::optional<Tensor>& mask) {
  constexpr const char* kOp = "merge_state_in_place";
  const Arg first{kOp, "v", v};
  check_pair(first, {kOp, "s", s}, {kOp, "v_other", v_other}, {kOp, "s_other", s_other});
  if (mask) {
    const Arg arg{kOp, "mask", *mask};
    check_same_device(arg, first);
    check_dtype(arg, {Dtype::Bool});
    check_shape(arg, std::array{v.size(0)}, "[seq_len]");
  }
  run_merge_state(first, s, v_other, s_other, v, s, mask ? &*mask : nullptr);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& v, const Tensor& s) {
  static const AccessKernels kernels(merge_name(kMergeStates));
  constexpr const char* kOp = "merge_states";
  const Arg states{kOp, "v", v};
  check_values(states, 4);
  check_lse({kOp, "s", s}, states, "[seq_len, num_states, num_heads]");
  const std::array shape{v.size(0), v.size(2), v.size(3)};
  const Tensor merged_v = empty(v, shape, v.scalar_type());
  const Tensor merged_s = empty(s, std::span(shape).first(2), Dtype::Float);
  if (shape[0] == 0 || shape[1] == 0) return {merged_v, merged_s};
  const int vec_size = access_width({&v, &merged_v}, {shape[2]});
  const MergeStatesParams params{.v_states = v.const_data_ptr(),
                                 .s_states = static_cast<const float*>(s.const_data_ptr()),
                                 .v = merged_v.mutable_data_ptr(),
                                 .s = static_cast<float*>(merged_s.mutable_data_ptr()),
                                 .v_strides = strides_of(v, 2),
                                 .s_strides = strides_of(s, 2),
                                 .v_state_stride = v.stride(1),
                                 .s_state_stride = s.stride(1),
                                 .num_states = v.size(1),
                                 .shape = merge_shape(states, shape[1], vec_size)};
  launch_merge(kernels, v, vec_size, params.shape, &params);
  return {merged_v, merged_s};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ridgeline, m) {
  m.def("merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor, Tensor)");
  m.def(
      "merge_state_in_place(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, "
      "Tensor? mask=None) -> ()");
  m.def("merge_states(Tensor v, Tensor s) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ridgeline, CUDA, m) {
  m.impl("merge_state", TORCH_BOX(&merge_state));
  m.impl("merge_state_in_place", TORCH_BOX(&merge_state_in_place));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace ridgeline
