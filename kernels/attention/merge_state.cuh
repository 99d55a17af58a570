// Two attention states to one: s = log(e^s_a + e^s_b), v = e^(s_a - s) v_a + e^(s_b - s) v_b.
//
// v_a, v_b and v [seq_len, num_heads, head_dim] of T, any strides but a last one of 1; s_a, s_b and
// s [seq_len, num_heads] float32. The result may overwrite the first state (the row's lanes have
// read s_a before one of them writes s). A state with s = -inf counts for nothing; two of them give
// 0 and -inf. Who owns a row: merge_row.cuh. kVec elements move at once, 16 bytes or 1 element. All
// SMs, any head_dim; seq_len * num_heads below 2^31.
#pragma once

#include "attention/merge_row.cuh"

namespace ridgeline {

template <class T, int kVec>
__global__ void __launch_bounds__(kMergeThreads)
    merge_state(const __grid_constant__ MergeStateParams params) {
  pdl_wait();
  const MergeRow at(params.shape);
  const bool kept = params.mask != nullptr && params.mask[at.token * params.mask_stride] == 0;
  const T* v_a = static_cast<const T*>(params.v_a) + at.offset(params.v_a_strides);
  const T* v_b = static_cast<const T*>(params.v_b) + at.offset(params.v_b_strides);
  const float s_a = params.s_a[at.offset(params.s_a_strides)];
  const float s_b = params.s_b[at.offset(params.s_b_strides)];
  // The first vectors come with the LSEs, not behind them.
  Vec<T, kVec> x_a, x_b;
  const auto fetch = [&](uint32 i) {
    x_a = load_once<kVec>(v_a + i * kVec);
    x_b = load_once<kVec>(v_b + i * kVec);
  };
  if (at.lane < params.shape.num_vecs && !kept) fetch(at.lane);
  pdl_launch_dependents();

  // The larger LSE has weight 1 before both are divided by their sum.
  const float larger = fmaxf(s_a, s_b);
  const float shift = larger == -kInfinity ? 0.0f : larger;
  const float power_a = expf(s_a - shift);
  const float power_b = expf(s_b - shift);
  const float total = power_a + power_b;
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  __syncwarp();
  if (!at.valid || kept) return;

  T* v = static_cast<T*>(params.v) + at.offset(params.v_strides);
  for (uint32 i = at.lane; i < params.shape.num_vecs; i += params.shape.lanes_per_row) {
    if (i != at.lane) fetch(i);
    float sum[kVec] = {};
    add_weighted(sum, x_a, power_a * scale);
    add_weighted(sum, x_b, power_b * scale);
    store(v + i * kVec, rounded<T>(sum));
  }
  if (at.lane == 0) params.s[at.offset(params.s_strides)] = shift + logf(total);
}

}  // namespace ridgeline
