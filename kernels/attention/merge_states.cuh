// Any number of attention states to one: s = log(sum_i e^s_i), v = sum_i e^(s_i - s) v_i.
//
// v_states [seq_len, num_states, num_heads, head_dim] of T, any strides but a last one of 1;
// s_states [seq_len, num_states, num_heads] float32; v and s contiguous without the states. The sum
// runs over the states in their order, so the bits depend on them alone. A state with s = -inf
// counts for nothing; without any other the result is 0 and -inf. Who owns a row: merge_row.cuh;
// all its lanes read all its s_i. The first kStatesAhead states are on their way together, s and v;
// later ones follow. kVec elements move at once, 16 bytes or 1 element. All SMs, any head_dim;
// seq_len * num_heads below 2^31.
#pragma once

#include "attention/merge_row.cuh"

namespace ridgeline {

constexpr int kStatesAhead = 8;

template <class T, int kVec>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const __grid_constant__ MergeStatesParams params) {
  pdl_wait();
  const MergeRow at(params.shape);
  if (!at.valid) return;
  const float* s_states = params.s_states + at.offset(params.s_strides);
  const T* v_states = static_cast<const T*>(params.v_states) + at.offset(params.v_strides);
  const auto fetch = [&](int64 i, uint32 vec_idx) {
    return load_once<kVec>(v_states + i * params.v_state_stride + vec_idx * kVec);
  };

  float ahead[kStatesAhead];  // s, then e^(s - shift)
  Vec<T, kVec> x[kStatesAhead];
#pragma unroll
  for (int i = 0; i < kStatesAhead; ++i) {
    ahead[i] = i < params.num_states ? s_states[i * params.s_state_stride] : -kInfinity;
  }
  const auto fetch_ahead = [&](uint32 vec_idx) {
#pragma unroll
    for (int i = 0; i < kStatesAhead; ++i) {
      if (i < params.num_states) x[i] = fetch(i, vec_idx);
    }
  };
  if (at.lane < params.shape.num_vecs) fetch_ahead(at.lane);
  pdl_launch_dependents();

  float largest = -kInfinity;
#pragma unroll
  for (int i = 0; i < kStatesAhead; ++i) largest = fmaxf(largest, ahead[i]);
  for (int64 i = kStatesAhead; i < params.num_states; ++i) {
    largest = fmaxf(largest, s_states[i * params.s_state_stride]);
  }
  const float shift = largest == -kInfinity ? 0.0f : largest;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kStatesAhead; ++i) total += ahead[i] = expf(ahead[i] - shift);
  for (int64 i = kStatesAhead; i < params.num_states; ++i) {
    total += expf(s_states[i * params.s_state_stride] - shift);
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;

  const uint32 head_dim = params.shape.num_vecs * kVec;
  T* v = static_cast<T*>(params.v) + static_cast<int64>(at.row) * head_dim;
  for (uint32 j = at.lane; j < params.shape.num_vecs; j += params.shape.lanes_per_row) {
    if (j != at.lane) fetch_ahead(j);
    float sum[kVec] = {};
#pragma unroll
    for (int i = 0; i < kStatesAhead; ++i) add_weighted(sum, x[i], ahead[i] * scale);
#pragma unroll 2
    for (int64 i = kStatesAhead; i < params.num_states; ++i) {
      add_weighted(sum, fetch(i, j), expf(s_states[i * params.s_state_stride] - shift) * scale);
    }
    store(v + j * kVec, rounded<T>(sum));
  }
  if (at.lane == 0) params.s[at.row] = shift + logf(total);
}

}  // namespace ridgeline
