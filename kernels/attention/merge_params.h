// What the merge kernels are told. Shared by the kernels and the host.
//
// A row is one head of one token, numbered token * num_heads + head. A state is its v [head_dim] of
// T and its s, the natural-log LSE, float32; s = -inf means that the state has seen no key.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

constexpr uint32 kMergeThreads = 128;

// States of a row that are on their way at once. Why few for few: registers for states that are not
// there keep threads off an SM; two states of 4,096 tokens take 29 us so, with eight ahead 46
// (H200).
constexpr int kFewStates = 4;
constexpr int kManyStates = 8;

struct MergeStrides {
  int64 token;  // elements
  int64 head;   // elements
};

struct MergeShape {
  uint32 num_rows;  // seq_len * num_heads, below 2^31
  Divider num_heads;
  uint32 num_vecs;       // head_dim / kVec
  uint32 lanes_per_row;  // merge_lanes(num_vecs)
};

struct MergeStateParams {
  const void* v_a;    // [seq_len, num_heads, head_dim], T
  const float* s_a;   // [seq_len, num_heads]
  const void* v_b;    // [seq_len, num_heads, head_dim], T
  const float* s_b;   // [seq_len, num_heads]
  void* v;            // [seq_len, num_heads, head_dim], T; may be v_a
  float* s;           // [seq_len, num_heads]; may be s_a
  const uint8* mask;  // [seq_len], rows of tokens with 0 are left alone; null: none is
  int64 mask_stride;  // elements
  MergeStrides v_a_strides, s_a_strides;
  MergeStrides v_b_strides, s_b_strides;
  MergeStrides v_strides, s_strides;
  MergeShape shape;
};

struct MergeStatesParams {
  const void* v_states;   // [seq_len, num_states, num_heads, head_dim], T
  const float* s_states;  // [seq_len, num_states, num_heads]
  void* v;                // [seq_len, num_heads, head_dim], T, contiguous
  float* s;               // [seq_len, num_heads], contiguous
  MergeStrides v_strides, s_strides;
  int64 v_state_stride, s_state_stride;  // elements
  uint32 num_states;                     // below 2^31
  MergeShape shape;
};

// A power of two of lanes, so that a row stays within a warp.
constexpr uint32 merge_lanes(uint32 num_vecs) {
  uint32 lanes = 1;
  while (lanes < 32 && lanes < num_vecs) lanes *= 2;
  return lanes;
}

constexpr uint32 merge_blocks(const MergeShape& shape) {
  const uint32 rows_per_block = kMergeThreads / shape.lanes_per_row;
  return shape.num_rows / rows_per_block + (shape.num_rows % rows_per_block != 0);
}

}  // namespace ridgeline
