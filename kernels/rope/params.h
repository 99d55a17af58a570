// What the rotary kernels are told, and how the work is cut. Shared by the kernels and the host.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

constexpr int kRopeMaxPairs = 256;  // rotary_dim is at most 512
constexpr uint32 kRopeMaxThreads = 256;
constexpr uint32 kRopeBlockThreads = 192;  // filled with tokens; small blocks share an SM better
constexpr uint32 kRopeHeadsPerThread = 4;  // heads whose loads a thread has in flight at once
constexpr uint32 kRopeTableSize = 1024;    // (cos, sin) of a block's tokens in shared memory

struct RopeTensor {
  const void* input;  // [nnz, num_heads, head_dim], T
  void* output;       // [nnz, num_heads, head_dim], T; may be the input
  int64 input_token_stride;
  int64 input_head_stride;
  int64 output_token_stride;
  int64 output_head_stride;
};

struct RopeShape {
  uint32 nnz;  // tokens, below 2^31
  uint32 num_q_heads;
  uint32 num_heads;         // of q and k together
  uint32 num_pairs;         // rotary_dim / 2
  uint32 num_copied_vecs;   // (head_dim - rotary_dim) / kVec; 0 when in place
  uint32 tokens_per_block;  // from rope_plan()
  uint32 head_step;         // from rope_plan()
  Divider lanes_per_head;   // num_pairs / kVec
  Divider threads_per_token;
};

struct RopePosIdsParams {
  RopeTensor q;
  RopeTensor k;
  const void* pos_ids;  // [nnz], int32 or int64, contiguous
  uint32 pos_ids_are_int64;
  RopeShape shape;
  // [num_pairs] turns of the circle that one position adds, modulo 1, in units of 2^-64:
  // theta^(-i / num_pairs) / (2 pi rope_scale). See angle.cuh.
  uint64 turns[kRopeMaxPairs];
};

struct RopePlan {
  uint32 lanes_per_head;  // each lane owns kVec pairs of a head
  uint32 head_step;       // a thread's heads are head_step apart
  uint32 threads_per_token;
  uint32 tokens_per_block;
  uint32 block;  // threads
};

// A thread owns the same pairs of up to kRopeHeadsPerThread heads (more if the block is full), so
// that it reads its cosines and sines once. Wants num_pairs from vec_size to kRopeMaxPairs.
constexpr RopePlan rope_plan(uint32 num_heads, uint32 num_pairs, int vec_size) {
  const uint32 lanes = num_pairs / static_cast<uint32>(vec_size);
  const uint32 wanted = (num_heads + kRopeHeadsPerThread - 1) / kRopeHeadsPerThread;
  const uint32 most = kRopeMaxThreads / lanes;
  const uint32 head_step = wanted < most ? wanted : most;
  const uint32 threads = lanes * head_step;
  const uint32 by_threads = threads < kRopeBlockThreads ? kRopeBlockThreads / threads : 1;
  const uint32 by_table = kRopeTableSize / num_pairs;
  const uint32 tokens = by_threads < by_table ? by_threads : by_table;
  return {lanes, head_step, threads, tokens, tokens * threads};
}

}  // namespace ridgeline
