// Rows normalised by their root mean square: y = x * rsqrt(mean(x^2) + eps) * weight, in float32,
// rounded once.
//
// A team of threads owns a row: lanes of one warp when rows are short, a warp, or a block
// (norm_plan in params.h). Thread t of a team of size n owns vectors t, t + n, t + 2n, ... A row
// stays in registers from the reduction to the scaling, so that memory is read once; what does not
// fit is read a second time. Where a row comes from and goes to is a `Row` type:
// - Row(params, row_idx): finds its pointers;
// - fetch(vec_idx) -> Fetched: issues the loads of a vector and does nothing else;
// - take(fetched, vec_idx): the vector to normalise (a fused add stores the residual here);
// - reload(vec_idx): the same vector again;
// - store(vec_idx, vector): writes the normalised vector.
#pragma once

#include "common/pdl.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "norm/params.h"

namespace ridgeline {

template <class T, int kVec>
__device__ __forceinline__ float sum_of_squares(const Vec<T, kVec>& x) {
  float values[kVec];
  x.to_floats(values);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

template <class T, class W, int kVec>
__device__ __forceinline__ Vec<T, kVec> scaled(const Vec<T, kVec>& x, float scale,
                                               const Vec<W, kVec>& weight) {
  float values[kVec], weights[kVec];
  x.to_floats(values);
  weight.to_floats(weights);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] *= scale * weights[i];
  Vec<T, kVec> y;
  y.from_floats(values);
  return y;
}

__device__ __forceinline__ float rms_scale(const NormShape& shape, float sum) {
  return rsqrtf(__fdividef(sum, shape.hidden) + shape.eps);
}

// Rows of at most 32 vectors: each team takes kNormSlots rows, one vector a thread and row, so that
// a thread has as many loads in flight as with long rows and reads its weights once.
template <class Row, class W, int kVec, class Params>
__device__ __forceinline__ void normalize_short_rows(const Params& params, const W* weight) {
  const NormShape& shape = params.shape;
  const uint32 team_size = shape.threads_per_row;
  const uint32 log2_team_size = 31 - __clz(team_size);
  const uint32 vec_idx = threadIdx.x & (team_size - 1);
  const uint32 num_teams = blockDim.x >> log2_team_size;
  const uint32 first_row = blockIdx.x * num_teams * kNormSlots + (threadIdx.x >> log2_team_size);
  const bool has_vec = vec_idx < shape.num_vecs;

  Row rows[kNormSlots];
  bool valid[kNormSlots];
  typename Row::Fetched fetched[kNormSlots];
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    const uint32 row_idx = first_row + i * num_teams;
    valid[i] = has_vec && row_idx < shape.num_rows;
    rows[i] = Row(params, row_idx < shape.num_rows ? row_idx : 0);
    if (valid[i]) fetched[i] = rows[i].fetch(vec_idx);
  }
  Vec<W, kVec> w;
  if (has_vec) w = load<kVec>(weight + vec_idx * kVec);
  pdl_launch_dependents();

  typename Row::Vector x[kNormSlots];
  float sums[kNormSlots];
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    sums[i] = 0.0f;
    if (!valid[i]) continue;
    x[i] = rows[i].take(fetched[i], vec_idx);
    sums[i] = sum_of_squares(x[i]);
  }
  group_sum(sums, team_size);
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    if (valid[i]) rows[i].store(vec_idx, scaled(x[i], rms_scale(shape, sums[i]), w));
  }
}

// Longer rows: a warp or a block takes one row.
template <class Row, class W, int kVec, class Params>
__device__ __forceinline__ void normalize_long_row(const Params& params, const W* weight) {
  __shared__ float warp_sums[kNormMaxThreads / kWarpSize];
  const NormShape& shape = params.shape;
  const uint32 team_size = shape.threads_per_row;
  const bool warp_team = team_size == kWarpSize;
  const uint32 row_idx =
      warp_team ? (blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize : blockIdx.x;
  if (row_idx >= shape.num_rows)
    return;  // whole warps only, and never in a block that synchronises
  const uint32 first = warp_team ? threadIdx.x % kWarpSize : threadIdx.x;
  const uint32 first_unheld = first + kNormSlots * team_size;
  const Row row(params, row_idx);

  // All loads first: the row, and the weights that only the scaling needs.
  typename Row::Fetched fetched[kNormSlots];
  Vec<W, kVec> w[kNormSlots];
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    const uint32 vec_idx = first + i * team_size;
    if (vec_idx < shape.num_vecs) fetched[i] = row.fetch(vec_idx);
  }
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    const uint32 vec_idx = first + i * team_size;
    if (vec_idx < shape.num_vecs) w[i] = load<kVec>(weight + vec_idx * kVec);
  }
  pdl_launch_dependents();

  typename Row::Vector x[kNormSlots];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    const uint32 vec_idx = first + i * team_size;
    if (vec_idx < shape.num_vecs) {
      x[i] = row.take(fetched[i], vec_idx);
      sum += sum_of_squares(x[i]);
    }
  }
  for (uint32 vec_idx = first_unheld; vec_idx < shape.num_vecs; vec_idx += team_size) {
    sum += sum_of_squares(row.take(row.fetch(vec_idx), vec_idx));
  }
  sum = warp_team ? warp_sum(sum) : block_sum(sum, warp_sums);
  const float scale = rms_scale(shape, sum);

#pragma unroll
  for (int i = 0; i < kNormSlots; ++i) {
    const uint32 vec_idx = first + i * team_size;
    if (vec_idx < shape.num_vecs) row.store(vec_idx, scaled(x[i], scale, w[i]));
  }
  for (uint32 vec_idx = first_unheld; vec_idx < shape.num_vecs; vec_idx += team_size) {
    row.store(vec_idx, scaled(row.reload(vec_idx), scale, load<kVec>(weight + vec_idx * kVec)));
  }
}

template <class Row, class W, int kVec, class Params>
__device__ __forceinline__ void normalize(const Params& params) {
  pdl_wait();
  const W* weight = static_cast<const W*>(params.weight);
  if (params.shape.num_vecs <= kWarpSize) {
    normalize_short_rows<Row, W, kVec>(params, weight);
  } else {
    normalize_long_row<Row, W, kVec>(params, weight);
  }
}

}  // namespace ridgeline
