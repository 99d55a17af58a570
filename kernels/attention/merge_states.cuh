// Any number of attention states to one: s = log(sum_i e^s_i), v = sum_i e^(s_i - s) v_i.
//
// v_states [seq_len, num_states, num_heads, head_dim] of T, any strides but a last one of 1;
// s_states [seq_len, num_states, num_heads] float32; v and s contiguous without the states. The sum
// runs over the states in their order, so the bits depend on them alone. A state with s = -inf
// counts for nothing; without any other the result is 0 and -inf. Who owns a row: merge_row.cuh;
// all its lanes read all its s_i, which come from L1 after the first. kVec elements move at once,
// 16 bytes or 1 element. All SMs, any head_dim; seq_len * num_heads below 2^31.
#pragma once

#include "attention/merge_row.cuh"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const __grid_constant__ MergeStatesParams params) {
  pdl_wait();
  pdl_launch_dependents();
  const MergeRow at(params.shape);
  if (!at.valid) return;
  const float* s_states = params.s_states + at.offset(params.s_strides);

  float largest = -kInfinity;
  for (int64 i = 0; i < params.num_states; ++i) {
    largest = fmaxf(largest, s_states[i * params.s_state_stride]);
  }
  const float shift = largest == -kInfinity ? 0.0f : largest;
  float total = 0.0f;
  for (int64 i = 0; i < params.num_states; ++i) {
    total += expf(s_states[i * params.s_state_stride] - shift);
  }
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;

  const uint32 head_dim = params.shape.num_vecs * kVec;
  const T* v_states = static_cast<const T*>(params.v_states) + at.offset(params.v_strides);
  T* v = static_cast<T*>(params.v) + static_cast<int64>(at.row) * head_dim;
  for (uint32 j = at.lane; j < params.shape.num_vecs; j += params.shape.lanes_per_row) {
    float sum[kVec] = {};
#pragma unroll 4
    for (int64 i = 0; i < params.num_states; ++i) {
      const Vec<T, kVec> x = load_once<kVec>(v_states + i * params.v_state_stride + j * kVec);
      add_weighted(sum, x, expf(s_states[i * params.s_state_stride] - shift) * scale);
    }
    store(v + j * kVec, rounded<T>(sum));
  }
  if (at.lane == 0) params.s[at.row] = shift + logf(total);
}

}  // namespace ridgeline
