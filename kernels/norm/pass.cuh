// The parts that norms are made of (common/row_pass.cuh): where rows come from, the affine
// transformation, and what is stored.
#pragma once

#include "common/arch.cuh"
#include "common/row_pass.cuh"
#include "norm/params.h"

namespace ridgeline {

template <class T, int kVec>
struct InputRow {
  using Vector = Vec<T, kVec>;
  using Fetched = Vector;
  const T* input;

  __device__ __forceinline__ InputRow() {}
  __device__ __forceinline__ InputRow(const NormParams& params, uint32 row)
      : input(static_cast<const T*>(params.input) +
              row_offset(params.shape.num_inner, params.input_strides, row)) {}
  __device__ __forceinline__ Fetched fetch(uint32 vec_idx) const {
    return load<kVec>(input + vec_idx * kVec);
  }
  __device__ __forceinline__ Vector take(const Fetched& fetched, uint32) const { return fetched; }
  __device__ __forceinline__ Vector reload(uint32 vec_idx) const { return fetch(vec_idx); }
};

// The sum of input and residual, rounded to T and stored in the residual.
template <class T, int kVec>
struct SumRow {
  using Vector = Vec<T, kVec>;
  struct Fetched {
    Vector input;
    Vector residual;
  };
  const T* input;
  T* residual;

  __device__ __forceinline__ SumRow() {}
  __device__ __forceinline__ SumRow(const NormParams& params, uint32 row)
      : input(static_cast<const T*>(params.input) +
              row_offset(params.shape.num_inner, params.input_strides, row)),
        residual(static_cast<T*>(params.residual) +
                 row_offset(params.shape.num_inner, params.residual_strides, row)) {}
  __device__ __forceinline__ Fetched fetch(uint32 vec_idx) const {
    Fetched fetched;
    fetched.input = load<kVec>(input + vec_idx * kVec);
    fetched.residual = load<kVec>(residual + vec_idx * kVec);
    return fetched;
  }
  __device__ __forceinline__ Vector take(const Fetched& fetched, uint32 vec_idx) const {
    float sums[kVec], inputs[kVec];
    fetched.residual.to_floats(sums);
    fetched.input.to_floats(inputs);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[i] += inputs[i];
    Vector sum;
    sum.from_floats(sums);
    store(residual + vec_idx * kVec, sum);
    return sum;
  }
  // The thread that stored the sum reads it.
  __device__ __forceinline__ Vector reload(uint32 vec_idx) const {
    return load<kVec>(residual + vec_idx * kVec);
  }
};

// x / root mean square * (weight + offset).
template <class W, int kVec>
struct Weight {
  static constexpr bool kHeld = true;
  static constexpr MomentsOf kMoments = MomentsOf::kRootMeanSquare;
  Vec<W, kVec> weight;

  __device__ __forceinline__ Weight() {}
  __device__ __forceinline__ Weight(const NormParams& params, uint32 vec_idx)
      : weight(load<kVec>(static_cast<const W*>(params.weight) + vec_idx * kVec)) {}
  __device__ __forceinline__ void apply(const NormParams& params, const Moments& moments,
                                        float (&values)[kVec]) const {
    float weights[kVec];
    weight.to_floats(weights);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      values[i] *= moments.inverse_root * (weights[i] + params.weight_offset);
    }
  }
  __device__ __forceinline__ void weigh(const NormParams& params, float (&values)[kVec]) const {
    float weights[kVec];
    weight.to_floats(weights);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] *= weights[i] + params.weight_offset;
  }
};

// (x - mean) / standard deviation * weight + bias.
template <class W, int kVec>
struct WeightAndBias {
  static constexpr bool kHeld = false;  // would spill
  static constexpr MomentsOf kMoments = MomentsOf::kMeanAndVariance;
  Vec<W, kVec> weight, bias;

  __device__ __forceinline__ WeightAndBias() {}
  __device__ __forceinline__ WeightAndBias(const NormParams& params, uint32 vec_idx)
      : weight(load<kVec>(static_cast<const W*>(params.weight) + vec_idx * kVec)),
        bias(load<kVec>(static_cast<const W*>(params.bias) + vec_idx * kVec)) {}
  static __device__ __forceinline__ void prefetch(const NormParams& params, uint32 vec_idx) {
    ridgeline::prefetch(static_cast<const W*>(params.weight) + vec_idx * kVec);
    ridgeline::prefetch(static_cast<const W*>(params.bias) + vec_idx * kVec);
  }
  __device__ __forceinline__ void apply(const NormParams&, const Moments& moments,
                                        float (&values)[kVec]) const {
    float weights[kVec], biases[kVec];
    weight.to_floats(weights);
    bias.to_floats(biases);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      values[i] = fmaf((values[i] - moments.mean) * moments.inverse_root, weights[i], biases[i]);
    }
  }
};

// Registers of a thread, at most. 32 let an SM hold all the threads that it has places for, 40 let
// it hold 1,536. An SM of Turing has 64 for each thread that it can hold.
template <class T, class W, class Q>
inline constexpr bool kIsWide = sizeof(W) > sizeof(T) || sizeof(Q) == 1;
template <class T, class W, class Q>
inline constexpr int kRmsnormRegisters = kSm < 80 || kIsWide<T, W, Q> ? 64
                                         : sizeof(T) == 4             ? 40
                                                                      : 32;
template <class T, class W, class Q>
inline constexpr int kLayernormRegisters = kSm < 80 || kIsWide<T, W, Q> ? 64
                                           : kThreadsOfSm < 2048        ? 48
                                                                        : 40;
template <class T, class W>
inline constexpr int kLongLayernormRegisters = kSm < 80 || kIsWide<T, W, T> ? 64 : 48;
template <class T, class W, class Q>
inline constexpr int kFusedAddRegisters = kSm < 80 || kIsWide<T, W, Q> ? 64 : 48;

// Q: what is stored, of T's own type or of 8 bits.
template <class R, class Affine, class Q, int kElements>
struct NormPass {
  using Row = R;
  using Columns = Affine;
  using Element = Q;
  static constexpr int kVec = kElements;
  static constexpr MomentsOf kMoments = Affine::kMoments;
  static constexpr Scaling kScaling = sizeof(Q) == 1 ? Scaling::kDivide : Scaling::kNone;

  static __device__ __forceinline__ void transform(const NormParams& params, const Moments& moments,
                                                   const Columns& columns, float (&values)[kVec]) {
    columns.apply(params, moments, values);
  }
  static __device__ __forceinline__ void weigh(const NormParams& params, const Columns& columns,
                                               float (&values)[kVec]) {
    columns.weigh(params, values);
  }
  static __device__ __forceinline__ int64 output_offset(const NormParams& params, uint32 row) {
    return row_offset(params.shape.num_inner, params.output_strides, row);
  }
};

}  // namespace ridgeline
