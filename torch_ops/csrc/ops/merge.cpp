// merge_state, merge_state_in_place, merge_states: schemas, checks, choice of kernel, launch.

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
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

constexpr const char* kMergeState = "attention/merge_state.cuh:merge_state";
constexpr const char* kMergeStates = "attention/merge_states.cuh:merge_states";

std::string pair_name(const Access& access) {
  return kernel_name(kMergeState, device_type(access.dtype), access.vec_size);
}

// Of at most kFewStates states, or of any number.
auto states_name(int ahead) {
  return [=](const Access& access) {
    return kernel_name(kMergeStates, device_type(access.dtype), access.vec_size, ahead);
  };
}

std::vector<Row> merge_rows() {
  std::vector<Row> rows;
  for (const char* op : {"merge_state", "merge_state_in_place"}) {
    add_access_rows(rows, op, pair_name, kMergeThreads);
  }
  for (const int ahead : {kFewStates, kManyStates}) {
    add_access_rows(rows, "merge_states", states_name(ahead), kMergeThreads);
  }
  return rows;
}

Choice merge_choose(const std::string& op, const Config& config, int) {
  if (op != "merge_states") return choose_access(config, pair_name);
  return choose_access(config, states_name(kManyStates));
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
  check_shape(s, v.sizes.first(v.sizes.size() - 1), meaning);
}

// The states (v, s) and (v_other, s_other) of one shape.
void check_pair(const Arg& v, const Arg& s, const Arg& v_other, const Arg& s_other) {
  check_values(v, 3);
  check_lse(s, v, "[seq_len, num_heads]");
  check_same_device(v_other, v);
  check_same_dtype(v_other, v);
  check_shape(v_other, v.sizes, "that of the first state");
  check_last_stride(v_other);
  check_lse(s_other, v, "[seq_len, num_heads]");
}

MergeShape merge_shape(const Arg& v, int64_t num_heads, int vec_size) {
  const int64_t num_rows = v.sizes[0] * num_heads;
  if (num_rows > kMaxRows) {
    fail(v.op, v.name, "fewer than 2^31 heads of tokens", std::to_string(num_rows),
         "Split the call");
  }
  const auto num_vecs = static_cast<uint32>(v.sizes.back() / vec_size);
  return {static_cast<uint32>(num_rows), make_divider(static_cast<uint32>(num_heads)), num_vecs,
          merge_lanes(num_vecs)};
}

MergeStrides strides_of(const Arg& arg, size_t head_dim_idx) {
  return {arg.strides[0], arg.strides[head_dim_idx]};
}

float* floats(const Arg& written) {
  return static_cast<float*>(written.tensor.mutable_data_ptr());
}

void launch_merge(const AccessKernels& kernels, const Arg& v, int vec_size, const MergeShape& shape,
                  const void* params) {
  launch(kernels.of(v.dtype, vec_size), device(v.gpu),
         {.grid_x = merge_blocks(shape), .block = kMergeThreads}, params);
}

void run_merge_state(const Arg& v_a, const Arg& s_a, const Arg& v_b, const Arg& s_b, const Arg& v,
                     const Arg& s, const Tensor* mask) {
  static const AccessKernels kernels(pair_name);
  const int64_t num_heads = v.sizes[1];
  if (v.sizes[0] == 0 || num_heads == 0) return;
  const int vec_size = access_width({&v, &v_a, &v_b}, {v.sizes[2]});
  const MergeStateParams params{
      .v_a = v_a.data,
      .s_a = static_cast<const float*>(s_a.data),
      .v_b = v_b.data,
      .s_b = static_cast<const float*>(s_b.data),
      .v = v.tensor.mutable_data_ptr(),
      .s = floats(s),
      .mask = mask ? static_cast<const uint8*>(mask->const_data_ptr()) : nullptr,
      .mask_stride = mask ? mask->stride(0) : 0,
      .v_a_strides = strides_of(v_a, 1),
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
  const Arg first{kOp, "v_a", v_a}, first_s{kOp, "s_a", s_a};
  const Arg second{kOp, "v_b", v_b}, second_s{kOp, "s_b", s_b};
  check_pair(first, first_s, second, second_s);
  const Tensor v = empty_like(first);
  const Tensor s = empty_like(first_s);
  run_merge_state(first, first_s, second, second_s, {kOp, "v", v}, {kOp, "s", s}, nullptr);
  return {v, s};
}

void merge_state_in_place(const Tensor& v, const Tensor& s, const Tensor& v_other,
                          const Tensor& s_other, const std::optional<Tensor>& mask) {
  constexpr const char* kOp = "merge_state_in_place";
  const Arg first{kOp, "v", v}, first_s{kOp, "s", s};
  const Arg second{kOp, "v_other", v_other}, second_s{kOp, "s_other", s_other};
  check_pair(first, first_s, second, second_s);
  if (mask) {
    const Arg arg{kOp, "mask", *mask};
    check_same_device(arg, first);
    check_dtype(arg, {Dtype::Bool});
    check_shape(arg, first.sizes.first(1), "[seq_len]");
  }
  run_merge_state(first, first_s, second, second_s, first, first_s, mask ? &*mask : nullptr);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& v, const Tensor& s) {
  static const AccessKernels few(states_name(kFewStates)), many(states_name(kManyStates));
  constexpr const char* kOp = "merge_states";
  const Arg states{kOp, "v", v}, lse{kOp, "s", s};
  check_values(states, 4);
  check_lse(lse, states, "[seq_len, num_states, num_heads]");
  const std::array shape{states.sizes[0], states.sizes[2], states.sizes[3]};
  const Tensor merged_v = empty(states.gpu, shape, states.dtype);
  const Tensor merged_s = empty(states.gpu, std::span(shape).first(2), Dtype::Float);
  if (states.sizes[1] > kMaxRows) {
    fail(kOp, "v", "fewer than 2^31 states", std::to_string(states.sizes[1]),
         "Merge them in parts");
  }
  if (shape[0] == 0 || shape[1] == 0) return {merged_v, merged_s};
  const Arg merged{kOp, "merged_v", merged_v};
  const int vec_size = access_width({&states, &merged}, {shape[2]});
  const MergeStatesParams params{.v_states = states.data,
                                 .s_states = static_cast<const float*>(lse.data),
                                 .v = merged_v.mutable_data_ptr(),
                                 .s = static_cast<float*>(merged_s.mutable_data_ptr()),
                                 .v_strides = strides_of(states, 2),
                                 .s_strides = strides_of(lse, 2),
                                 .v_state_stride = states.strides[1],
                                 .s_state_stride = lse.strides[1],
                                 .num_states = static_cast<uint32>(states.sizes[1]),
                                 .shape = merge_shape(states, shape[1], vec_size)};
  launch_merge(params.num_states <= kFewStates ? few : many, states, vec_size, params.shape,
               &params);
  return {merged_v, merged_s};
}

}  // namespace

static void schemas(Library& m) {
  m.def("merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor, Tensor)");
  m.def(
      "merge_state_in_place(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, "
      "Tensor? mask=None) -> ()");
  m.def("merge_states(Tensor v, Tensor s) -> (Tensor, Tensor)");
}

static void kernels(Library& m) {
  m.impl("merge_state", TORCH_BOX(&merge_state));
  m.impl("merge_state_in_place", TORCH_BOX(&merge_state_in_place));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
