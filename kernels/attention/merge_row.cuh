// Which row and which lane of it a thread of a merge kernel has, and the arithmetic on vectors.
#pragma once

#include "attention/merge_params.h"
#include "common/fast_math.cuh"
#include "common/pdl.cuh"
#include "common/vec.cuh"

namespace ridgeline {

// lanes_per_row neighbouring lanes of a warp own a row; lane t has vectors t, t + lanes_per_row,
// ...
struct MergeRow {
  uint32 row;
  uint32 token;
  uint32 head;
  uint32 lane;
  bool valid;

  __device__ __forceinline__ explicit MergeRow(const MergeShape& shape) {
    lane = threadIdx.x & (shape.lanes_per_row - 1);
    const uint32 row_in_block = threadIdx.x / shape.lanes_per_row;
    // Why 64 bits: the last block may reach past 2^32 / lanes before it is cut off.
    const int64 wanted =
        static_cast<int64>(blockIdx.x) * (blockDim.x / shape.lanes_per_row) + row_in_block;
    valid = wanted < shape.num_rows;
    row = valid ? static_cast<uint32>(wanted) : 0;
    token = shape.num_heads.quotient(row);
    head = row - token * shape.num_heads.divisor;
  }
  __device__ __forceinline__ int64 offset(const MergeStrides& strides) const {
    return token * strides.token + head * strides.head;
  }
};

// sum += weight * x. A weight of 0 keeps out whatever x holds, NaN included.
template <class T, int kVec>
__device__ __forceinline__ void add_weighted(float (&sum)[kVec], const Vec<T, kVec>& x,
                                             float weight) {
  if (weight == 0.0f) return;
  float values[kVec];
  x.to_floats(values);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight, values[i], sum[i]);
}

template <class T, int kVec>
__device__ __forceinline__ Vec<T, kVec> rounded(const float (&sum)[kVec]) {
  Vec<T, kVec> y;
  y.from_floats(sum);
  return y;
}

}  // namespace ridgeline
