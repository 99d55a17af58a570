// Which batch kernel a call gets, its grid and workspace, and what the scheduler is told of its
// tiles: from shapes, the longest query and the GPU alone.
#pragma once

#include <array>
#include <limits>
#include <string>

#include "attention/batch_params.h"
#include "runtime/catalog.h"

namespace ridgeline {

struct BatchProblem {
  bool bf16 = false;
  int head_dim_qk = 128, head_dim_vo = 128;
  int64 batch_size = 1;
  int64 num_tokens = 1;
  int64 max_q_len = 1;  // at most num_tokens
  int64 num_qo_heads = 1, num_kv_heads = 1;
  int64 max_keys = std::numeric_limits<int64>::max();  // of all requests, by the shapes
  bool paged = true;
  bool invariant = false;
  bool rotates = false;
  bool fp16_logits = false;
  bool caps = false;  // caps_products() says so
};

struct BatchGpu {
  int sm;
  int num_sms;
  int smem_per_sm;  // bytes
};

struct BatchPlan {
  int dims;       // index of the head dims
  int kernel;     // index of the tile heights
  int low, high;  // tile heights, equal where there is one
  bool wide;      // a CTA has an SM to itself
  int block;
  int dynamic_smem;  // bytes
  int num_sms;
  int num_ctas;    // that a list is shared out to
  int team_size;   // CTAs that work on neighbouring KV heads side by side
  int max_tiles;   // of a list by tile; 0: there is none
  int max_split;   // of these, of one head, that may be split into ones of the low height
  int max_ranges;  // of records, of a list that is shared out
  int few_tiles;   // KV tiles that a request of a pair's second segment has for a warp alone
  int slot_rows;
  int64 num_partial_rows;
  bool in_one_launch;  // the attention kernel adds up its parts itself, where it has counters
};

// Two segments in one launch. `both` has the kernel of the first, which holds 16 rows and more.
struct PairPlan {
  BatchPlan both;
  int kernel_b;  // the same, or 0
};

inline constexpr int kNumBatchDims = 4;
inline constexpr int kNumBatchKernels = 5;
inline constexpr int kNumBatchVariants = 5;

BatchPlan plan_batch(const BatchProblem& problem, const BatchGpu& gpu);
std::string batch_name(int dims, int kernel, bool paged, bool bf16, int variant);
std::string batch_combine_name(bool bf16);
std::string pair_combine_name(bool bf16);
std::string schedule_name(bool tall, int num_segments = 1);

// Head dims and dtype are the first's; the second's keys are paged.
PairPlan plan_pair(const BatchProblem& a, const BatchProblem& b, const BatchGpu& gpu);
std::string pair_name(int dims, int kernel, bool paged, int kernel_b, bool bf16);
// Lowest and highest tile height of a kernel.
std::array<int, 2> heights_of(int kernel);
TileHeight tile_height(int dims, int tile_q, int sm, bool wide);

// Index of the variant's name, below kNumBatchVariants.
int batch_variant(const BatchProblem& problem, const BatchPlan& plan, int sm);

}  // namespace ridgeline
