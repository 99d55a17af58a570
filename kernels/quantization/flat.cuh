// All vectors of a tensor, whatever its rows: thread t of a grid of n takes vectors t, t + n, ...
#pragma once

#include "common/vec.cuh"
#include "quantization/params.h"

namespace ridgeline {

struct FlatPlace {
  uint32 row;
  uint32 column;  // vectors

  __device__ __forceinline__ FlatPlace() {}
  // This thread's first.
  __device__ __forceinline__ explicit FlatPlace(const FlatRows& rows) {
    const uint32 thread = blockIdx.x * kFlatThreads + threadIdx.x;
    row = rows.vecs_per_row.quotient(thread);
    column = thread - row * rows.vecs_per_row.divisor;
  }
  __device__ __forceinline__ bool exists(const FlatRows& rows) const { return row < rows.num_rows; }
  __device__ __forceinline__ void advance(const FlatRows& rows) {
    row += rows.step_rows;
    column += rows.step_columns;
    if (column >= rows.vecs_per_row.divisor) {
      column -= rows.vecs_per_row.divisor;
      ++row;
    }
  }
  // The same place counted from the tensor's end.
  __device__ __forceinline__ FlatPlace mirrored(const FlatRows& rows) const {
    FlatPlace place = *this;
    place.row = rows.num_rows - 1 - row;
    place.column = rows.vecs_per_row.divisor - 1 - column;
    return place;
  }
  // Elements from the start of a tensor with the rows' strides, and of a contiguous one.
  template <int kVec>
  __device__ __forceinline__ int64 strided(const FlatRows& rows) const {
    return row_offset(rows.num_inner, rows.strides, row) + int64{column} * kVec;
  }
  template <int kVec>
  __device__ __forceinline__ int64 contiguous(const FlatRows& rows) const {
    return (int64{row} * rows.vecs_per_row.divisor + column) * kVec;
  }
};

}  // namespace ridgeline
