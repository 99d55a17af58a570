// How the kernels that read a row, reduce it and write it spread rows over threads. Shared by the
// kernels and the host.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// Vectors of a row that one thread keeps in registers unless a kernel says otherwise, and rows of
// one vector each when rows are short.
constexpr int kRowSlots = 2;
constexpr uint32 kRowMaxThreads = 1024;
constexpr uint32 kRowFewBlocks = 512;  // up to here columns come from memory, not from a cache

struct RowShape {
  uint32 num_rows;         // below 2^31
  uint32 num_vecs;         // of a row
  uint32 threads_per_row;  // from row_plan()
  Divider num_inner;       // rows of the inner dimension; num_rows when all rows have one stride
};

struct RowPlan {
  uint32 threads_per_row;  // a power of two up to 32, or a whole block
  uint32 rows_per_block;
  uint32 block;  // threads
};

// Lanes that have a vector each: a power of two, up to 32.
constexpr uint32 lanes_for(int64 num_vecs) {
  uint32 lanes = 1;
  while (lanes < num_vecs) lanes *= 2;
  return lanes;
}

// The plan follows from the kernel and the row length alone, so that a row has the same bits in
// every batch.
//   up to 32 vectors: a group of lanes takes kRowSlots rows, one vector a lane and row;
//   up to 32 * slots: a warp takes a row;
//   more: a block takes a row; what exceeds kRowMaxThreads * slots vectors is read again by every
//   step.
// Why two vectors a thread, measured on an H200: with one the blocks grow too large to overlap,
// with four or eight a short batch of rows waits longer for its loads and its reduction.
constexpr RowPlan row_plan(int64 length, int vec_size, int slots = kRowSlots) {
  const int64 num_vecs = length / vec_size;
  if (num_vecs <= 32) {
    const uint32 threads = lanes_for(num_vecs);
    return {threads, 128 / threads * kRowSlots, 128};
  }
  if (num_vecs <= 32 * slots) return {32, 4, 128};
  const int64 needed = ((num_vecs + slots - 1) / slots + 31) / 32 * 32;
  const uint32 threads = needed < kRowMaxThreads ? static_cast<uint32>(needed) : kRowMaxThreads;
  return {threads, 1, threads};
}

// Where rows are only reduced to their maximum, the same in any order, a group of lanes takes one
// row of 8 to 32 * kRowSlots vectors, kRowSlots vectors a lane: half the reductions and addresses
// of row_plan(). Groups of 128 of [16384, 4096] take 50 us, by row_plan() 54 (H200). Why not
// shorter ones: with less than 64 bytes side by side a load takes longer, 19 us instead of 17 for
// groups of 32 of [4096, 4096].
constexpr bool is_split(int64 num_vecs) {
  return num_vecs >= 8 && num_vecs <= 32 * kRowSlots;
}

constexpr RowPlan maxima_plan(int64 length, int vec_size) {
  const int64 num_vecs = length / vec_size;
  if (!is_split(num_vecs)) return row_plan(length, vec_size);
  const uint32 lanes = lanes_for((num_vecs + kRowSlots - 1) / kRowSlots);
  return {lanes, 128 / lanes, 128};
}

}  // namespace ridgeline
