// Any number of attention states to one: s = log(sum_i e^s_i), v = sum_i e^(s_i - s) v_i.
//
// v_states [seq_len, num_states, num_heads, head_dim] of T, any strides but a last one of 1;
// s_states [seq_len, num_states, num_heads] float32; v and s contiguous without the states. The sum
// runs over the states in their order, so the bits depend on them alone. A state with s = -inf
// counts for nothing; without any other the result is 0 and -inf. Who owns a row: merge_row.cuh;
// all its lanes read all its s_i. kAhead states are on their way at once, s_i and v_i together; no
// others exist if kAhead is kFewStates. kVec elements move at once, 16 bytes or 1 element. All SMs,
// any head_dim; seq_len * num_heads below 2^31.
#pragma once

#include "attention/merge_row.cuh"

namespace ridgeline {

template <class T, int kVec, int kAhead>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const __grid_constant__ MergeStatesParams params) {
  pdl_wait();
  const MergeRow at(params.shape);
  if (!at.valid) return;
  const float* s_states = params.s_states + at.offset(params.s_strides);
  const T* v_states = static_cast<const T*>(params.v_states) + at.offset(params.v_strides);
  // States from `first` on; what is not there has s = -inf, and its x is not looked at.
  const auto fetch_s = [&](uint32 first, float (&s)[kAhead]) {
    const float* from = s_states + first * params.s_state_stride;
#pragma unroll
    for (uint32 i = 0; i < kAhead; ++i) {
      s[i] = first + i < params.num_states ? *from : -kInfinity;
      from += params.s_state_stride;
    }
  };
  Vec<T, kVec> x[kAhead];
  const auto fetch_v = [&](uint32 first, uint32 vec_idx) {
    const T* from = v_states + first * params.v_state_stride + vec_idx * kVec;
#pragma unroll
    for (uint32 i = 0; i < kAhead; ++i) {
      if (first + i < params.num_states) x[i] = load_once<kVec>(from);
      from += params.v_state_stride;
    }
  };
  const auto for_later_states = [&](const auto& use) {
    if constexpr (kAhead > kFewStates) {
#pragma unroll 1
      for (uint32 first = kAhead; first < params.num_states; first += kAhead) use(first);
    }
  };

  float weights[kAhead], s[kAhead];
  fetch_s(0, weights);
  if (at.lane < params.shape.num_vecs) fetch_v(0, at.lane);
  pdl_launch_dependents();

  float largest = -kInfinity;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) largest = fmaxf(largest, weights[i]);
  for_later_states([&](uint32 first) {
    fetch_s(first, s);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) largest = fmaxf(largest, s[i]);
  });
  const float shift = largest == -kInfinity ? 0.0f : largest;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) total += weights[i] = expf(weights[i] - shift);
  for_later_states([&](uint32 first) {
    fetch_s(first, s);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) total += expf(s[i] - shift);
  });
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;

  const uint32 head_dim = params.shape.num_vecs * kVec;
  T* v = static_cast<T*>(params.v) + static_cast<int64>(at.row) * head_dim;
#pragma unroll 1
  for (uint32 j = at.lane; j < params.shape.num_vecs; j += params.shape.lanes_per_row) {
    if (j != at.lane) fetch_v(0, j);
    float sum[kVec] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add_weighted(sum, x[i], weights[i] * scale);
    for_later_states([&](uint32 first) {
      fetch_v(first, j);
      fetch_s(first, s);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) add_weighted(sum, x[i], expf(s[i] - shift) * scale);
    });
    store(v + j * kVec, rounded<T>(sum));
  }
  if (at.lane == 0) params.s[at.row] = shift + logf(total);
}

}  // namespace ridgeline
