// Which attention kernel a problem gets, and how its keys are split: from shapes, dtype, mask and
// the GPU alone.
#pragma once

#include <optional>
#include <string>

#include "attention/params.h"
#include "runtime/catalog.h"

namespace ridgeline {

struct AttentionProblem {
  bool bf16 = false;
  int head_dim_qk = 128, head_dim_vo = 128;
  int64 qo_len = 1, kv_len = 1;
  int64 num_qo_heads = 1, num_kv_heads = 1;
  bool causal = false;
  int64 window_left = -1;
  bool rotates = false;      // RopeLlamaVariant
  bool fp16_logits = false;  // Fp16Logits
};

// What the choice depends on of a GPU.
struct AttentionGpu {
  int sm;  // the code path, 75 to 90
  int num_sms;
  int smem_per_sm;  // bytes
};

struct AttentionPlan {
  int candidate;  // index of the head dims and tile in the table
  int tile_q;
  int block;
  int dynamic_smem;  // bytes
  int num_q_tiles;
  int num_splits;
  bool in_one_launch;  // the attention kernel adds up its parts itself, where it has counters
};

inline constexpr int kNumAttentionVariants = 4;

// Index of the variant's name, below kNumAttentionVariants.
constexpr int attention_variant(const AttentionProblem& problem) {
  return (problem.rotates ? 1 : 0) + (problem.fp16_logits ? 2 : 0);
}

int num_attention_candidates();
std::string attention_name(int candidate, bool bf16, int variant);
std::string combine_name(bool bf16);

// Head dims and lengths are those of a call that passed its checks.
AttentionPlan plan_attention(const AttentionProblem& problem, const AttentionGpu& gpu);

}  // namespace ridgeline
