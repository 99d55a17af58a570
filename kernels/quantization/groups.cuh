// Groups of neighbouring elements of a row, each with a scale: the rows of common/row_pass.cuh when
// it quantizes. A group of a whole row is quantization per token.
#pragma once

#include "common/row_pass.cuh"
#include "quantization/params.h"

namespace ridgeline {

__device__ __forceinline__ int64 group_offset(const QuantizeParams& params,
                                              const RowStrides& strides, uint32 group) {
  const uint32 row = params.num_groups.quotient(group);
  const uint32 in_row = group - row * params.num_groups.divisor;
  return row_offset(params.shape.num_inner, strides, row) + in_row * params.group_size;
}

template <class T, int kVec>
struct GroupRow {
  using Vector = Vec<T, kVec>;
  using Fetched = Vector;
  const T* input;

  __device__ __forceinline__ GroupRow() {}
  __device__ __forceinline__ GroupRow(const QuantizeParams& params, uint32 group)
      : input(static_cast<const T*>(params.input) +
              group_offset(params, params.input_strides, group)) {}
  __device__ __forceinline__ Fetched fetch(uint32 vec_idx) const {
    return load<kVec>(input + vec_idx * kVec);
  }
  __device__ __forceinline__ Vector take(const Fetched& fetched, uint32) const { return fetched; }
  __device__ __forceinline__ Vector reload(uint32 vec_idx) const { return fetch(vec_idx); }
};

struct NoColumns {
  static constexpr bool kHeld = false;
  __device__ __forceinline__ NoColumns() {}
  __device__ __forceinline__ NoColumns(const QuantizeParams&, uint32) {}
  static __device__ __forceinline__ void prefetch(const QuantizeParams&, uint32) {}
};

template <class From, class To, int kElements, Scaling kHow>
struct GroupPass {
  using Row = GroupRow<From, kElements>;
  using Columns = NoColumns;
  using Element = To;
  static constexpr int kVec = kElements;
  static constexpr MomentsOf kMoments = MomentsOf::kNothing;
  static constexpr Scaling kScaling = kHow;

  static __device__ __forceinline__ void transform(const QuantizeParams&, const Moments&,
                                                   const NoColumns&, float (&)[kVec]) {}
  static __device__ __forceinline__ int64 output_offset(const QuantizeParams& params,
                                                        uint32 group) {
    return group_offset(params, params.output_strides, group);
  }
};

}  // namespace ridgeline
