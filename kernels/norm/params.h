// What the norm kernels are told, and how a row is spread over threads. Shared by the kernels and
// the host.
#pragma once

#include "common/divide.h"
#include "common/rows.h"
#include "common/types.h"

namespace ridgeline {

// Vectors of a row that one thread keeps in registers, or rows of one vector each when rows are
// short.
constexpr int kNormSlots = 2;
constexpr uint32 kNormMaxThreads = 1024;

struct NormShape {
  uint32 num_rows;         // below 2^31
  uint32 num_vecs;         // hidden / kVec
  uint32 threads_per_row;  // from norm_plan()
  Divider num_inner;       // rows of the inner dimension; num_rows when all rows have one stride
  float hidden;            // the divisor of the mean
  float eps;
};

struct RmsnormParams {
  const void* input;   // [num_outer, num_inner, hidden], T
  const void* weight;  // [hidden], W, contiguous
  void* output;        // [num_outer, num_inner, hidden], T
  RowStrides input_strides;
  RowStrides output_strides;
  NormShape shape;
};

struct FusedAddRmsnormParams {
  void* input;         // [num_outer, num_inner, hidden], T; overwritten with the normalised rows
  void* residual;      // [num_outer, num_inner, hidden], T; overwritten with residual + input
  const void* weight;  // [hidden], W, contiguous
  RowStrides input_strides;
  RowStrides residual_strides;
  NormShape shape;
};

struct NormPlan {
  uint32 threads_per_row;  // a power of two up to 32, or a whole block
  uint32 rows_per_block;
  uint32 block;  // threads
};

// The plan follows from the row length alone, so that a row has the same bits in every batch.
//   up to 32 vectors: a group of lanes takes kNormSlots rows, one vector a lane and row;
//   up to 32 * kNormSlots: a warp takes a row;
//   more: a block takes a row; what exceeds kNormMaxThreads * kNormSlots vectors is read a second
//   time.
// Why two vectors a thread, measured on an H200: with one the blocks grow too large to overlap,
// with four or eight a short batch of rows waits longer for its loads and its reduction.
constexpr NormPlan norm_plan(int64 hidden, int vec_size) {
  const int64 num_vecs = hidden / vec_size;
  if (num_vecs <= 32) {
    uint32 threads = 1;
    while (threads < num_vecs) threads *= 2;
    return {threads, 128 / threads * kNormSlots, 128};
  }
  if (num_vecs <= 32 * kNormSlots) return {32, 4, 128};
  const int64 needed = ((num_vecs + kNormSlots - 1) / kNormSlots + 31) / 32 * 32;
  const uint32 threads = needed < kNormMaxThreads ? static_cast<uint32>(needed) : kNormMaxThreads;
  return {threads, 1, threads};
}

}  // namespace ridgeline
