// What the rotary kernels are told, and how the work is cut. Shared by the kernels and the host.
#pragma once

#include "common/divide.h"
#include "common/paging.h"
#include "common/types.h"
#include "page/params.h"

namespace ridgeline {

constexpr int kRopeMaxPairs = 256;     // rotary_dim is at most 512
constexpr uint32 kRopeWarps = 4;       // of a block
constexpr uint32 kRopeHeads = 4;       // whose loads a thread has in flight at once
constexpr uint32 kRopeFewTokens = 64;  // up to here a thread takes one head

struct RopeTensor {
  const void* input;  // [nnz, num_heads, head_dim], T
  void* output;       // [nnz, num_heads, head_dim], T; may be the input
  int64 input_token_stride;
  int64 input_head_stride;
  int64 output_token_stride;
  int64 output_head_stride;
};

struct RopeShape {
  uint32 nnz;  // tokens; nnz * num_slices is below 2^31
  uint32 num_q_heads;
  uint32 num_heads;        // of q and k together
  uint32 num_pairs;        // rotary_dim / 2
  uint32 num_copied_vecs;  // (head_dim - rotary_dim) / kVec; 0 when in place
  uint32 team_size;        // from rope_plan()
  uint32 heads_per_slice;  // from rope_plan()
  Divider num_slices;      // of a token
  Divider num_units;       // num_pairs / kVec, of a head
};

// Where a token's position comes from; found by positions.cuh.
struct PosIds {
  Indices ids;  // [nnz]
};

// The i-th token of request r is at offsets[r] + i. A token of no request is at 0.
struct RequestOffsets {
  const int32* indptr;  // [batch_size + 1], tokens
  Indices offsets;      // [batch_size]
  uint32 batch_size;
};

// Where the angle of a position comes from; computed by angle.cuh.
struct Frequencies {
  // [num_pairs] turns of the circle that one position adds, modulo 1, in units of 2^-64.
  uint64 turns[kRopeMaxPairs];
};

struct CosSinCache {
  const float* values;  // [num_positions, 2 * num_pairs]: a position's cosines, then its sines
  int64 stride;         // elements from one position to the next
  int64 num_positions;  // at least 1
  uint32 num_pairs;
};

template <class Positions, class Angles>
struct RopeParams {
  RopeTensor q;
  RopeTensor k;
  RopeShape shape;
  Positions positions;
  Angles angles;
};

struct RopePlan {
  uint32 team_size;  // threads of a head: a power of two, at most 32
  uint32 heads_per_slice;
  uint32 num_slices;
};

// A warp takes a slice of a token's heads. Few tokens: one head a thread, so that no thread goes
// through one head after the other. Many: kRopeHeads, so that it makes the token's angles once.
// Wants num_pairs from vec_size to kRopeMaxPairs.
constexpr RopePlan rope_plan(uint32 num_heads, uint32 num_pairs, uint32 num_tokens, int vec_size) {
  uint32 team = 1;
  while (team < num_pairs / vec_size && team < 32) team *= 2;
  const uint32 heads = 32 / team * (num_tokens <= kRopeFewTokens ? 1 : kRopeHeads);
  return {team, heads, (num_heads + heads - 1) / heads};
}

constexpr int kRopeAppendMaxHeadDim = 256;
constexpr uint32 kRopeAppendMaxPairs = kRopeAppendMaxHeadDim / 2;
constexpr uint32 kRopeAppendWarps = 2;        // of a block
constexpr uint32 kRopeAppendFewTokens = 256;  // up to here a thread takes half as many heads

// Units that a lane owns of a head: kRopeAppendMaxHeadDim elements over 32 lanes of two vectors.
constexpr int rope_append_units(int vec_size) {
  return vec_size == 1 ? kRopeAppendMaxHeadDim / 64 : 1;
}

// Heads whose loads a thread has in flight at once. Single elements come in several units: fewer
// heads, for as many loads.
constexpr uint32 rope_append_heads(int vec_size) {
  return vec_size == 1 ? 2 : 4;
}

// How a head's vectors are paired into units: first those that turn, then the rest, two by two.
struct HeadUnits {
  uint32 num_turning;  // units of kVec pairs
  uint32 rotary_dim;   // elements
  uint32 num_rest;     // units of the rest
  uint32 rest_vecs;    // vectors of the rest

  constexpr uint32 count() const { return num_turning + num_rest; }
};

constexpr HeadUnits head_units(uint32 head_dim, uint32 rotary_dim, uint32 vec_size) {
  const uint32 rest_vecs = (head_dim - rotary_dim) / vec_size;
  return {rotary_dim / 2 / vec_size, rotary_dim, (rest_vecs + 1) / 2, rest_vecs};
}

struct RopeAppendShape {
  uint32 nnz;  // tokens; nnz * num_slices is below 2^31
  uint32 num_q_heads;
  uint32 num_kv_heads;
  uint32 num_pairs;  // rotary_dim / 2
  HeadUnits qk_units;
  HeadUnits v_units;
  uint32 team_size;           // threads of a head: a power of two, at most 32
  uint32 q_heads_per_slice;   // from rope_append_plan()
  uint32 kv_heads_per_slice;  // from rope_append_plan()
  uint32 num_q_slices;        // of a token
  Divider num_slices;         // of a token: of q, then of k and v
  Divider turning_units;      // qk_units.num_turning
};

// Root mean square norm of each head of q and k.
struct HeadNorm {
  const void* q_weight;  // [head_dim], T or float; null: no norm
  const void* k_weight;  // [head_dim], as q_weight
  bool weights_are_float;
  float head_dim;
  float eps;
};

struct RopeAppendParams {
  RopeTensor q;
  CacheSide k;
  CacheSide v;
  Indices batch_indices;  // [nnz]
  Indices positions;      // [nnz], in the cache
  Indices pos_ids;        // [nnz], for the angle
  PageTable table;
  HeadNorm norm;
  RopeAppendShape shape;
  CosSinCache cache;  // values null: the frequencies count
  Frequencies frequencies;
};

struct RopeAppendPlan {
  uint32 team_size;
  uint32 q_heads_per_slice;
  uint32 kv_heads_per_slice;
  uint32 num_q_slices;
  uint32 num_slices;  // of q, and of k and v together
};

// A warp takes a slice of a token: some heads of q, or half as many of k and the same of v. Many
// tokens: as many heads a thread as it has registers for, since every warp makes the token's
// angles.
constexpr RopeAppendPlan rope_append_plan(uint32 num_q_heads, uint32 num_kv_heads, uint32 num_units,
                                          uint32 num_tokens, int vec_size) {
  uint32 team = 1;
  while (team < num_units && team < 32) team *= 2;
  const uint32 heads_at_once = 32 / team;
  const uint32 most = rope_append_heads(vec_size);
  const uint32 heads = num_tokens <= kRopeAppendFewTokens ? most / 2 : most;
  const uint32 q_heads = heads_at_once * heads;
  const uint32 kv_heads = heads_at_once * (heads / 2 > 0 ? heads / 2 : 1);
  const uint32 num_q_slices = (num_q_heads + q_heads - 1) / q_heads;
  return {team, q_heads, kv_heads, num_q_slices,
          num_q_slices + (num_kv_heads + kv_heads - 1) / kv_heads};
}

constexpr int kRopePlainHeadDim = 128;
constexpr uint32 kRopePlainHeads = 8;  // of a warp
constexpr uint32 kRopePlainWarps = 4;  // of a block

// In the order in which they are needed, in lines of the cache that they come through. Strides in
// elements.
struct RopePlainParams {
  Divider num_slices;  // of a token: of q, then of k, then of v
  uint32 num_tokens;
  uint32 first_k_slice;
  uint32 first_v_slice;
  uint32 num_q_heads;
  uint32 num_kv_heads;
  const int32* pos_ids;  // [num_tokens], for the angle
  void* q_out;
  const void* q;  // [num_tokens, num_q_heads, kRopePlainHeadDim]; k and v as well
  const void* k;
  const void* v;
  uint32 q_token_stride;
  uint32 k_token_stride;
  uint32 v_token_stride;
  uint32 q_out_token_stride;
  const void* q_weight;  // [kRopePlainHeadDim], T; of a kernel with norms
  const void* k_weight;
  float eps;
  float k_inverse_scale;
  const int32* batch_indices;  // [num_tokens]
  const int32* positions;      // [num_tokens], in the cache
  PageTable table;
  float v_inverse_scale;
  void* k_cache;
  void* v_cache;
  PagedStrides k_strides;  // of heads below 2^31 / num_heads
  PagedStrides v_strides;
  uint64 turns[kRopePlainHeadDim / 2];
};

}  // namespace ridgeline
