#include "ops/attention_choice.h"

#include <algorithm>
#include <array>

#include "ops/tile_sms.h"
#include "runtime/names.h"

namespace ridgeline {
namespace {

struct Candidate {
  int head_dim_qk, head_dim_vo;  // of the kernel; smaller ones are padded with zeros
  int tile_q;                    // rows of a query tile: queries times query heads of a KV head
  const char* why;
};

// Head dims in the order in which a problem takes the first that holds it; tiles ascending. There
// is no tile of 128 rows for 256 wide heads: eight warps of 16 rows reached 290 TFLOP/s where two
// CTAs of 64 rows reach 310 (H200).
constexpr std::array kCandidates = {
    Candidate{64, 64, 16, "decode: K and V read once, warps divide the keys"},
    Candidate{64, 64, 64, "few queries, or too few tiles of 128 rows to fill the GPU"},
    Candidate{64, 64, 128, "prefill: a fragment of K or V serves two of queries"},
    Candidate{128, 128, 16, "decode: K and V read once, warps divide the keys"},
    Candidate{128, 128, 64, "few queries, or too few tiles of 128 rows to fill the GPU"},
    Candidate{128, 128, 128, "prefill: a fragment of K or V serves two of queries"},
    Candidate{192, 128, 16, "decode: K and V read once, warps divide the keys"},
    Candidate{192, 128, 64, "few queries, or too few tiles of 128 rows to fill the GPU"},
    Candidate{192, 128, 128, "prefill: a fragment of K or V serves two of queries"},
    Candidate{256, 256, 16, "decode: K and V read once, warps divide the keys"},
    Candidate{256, 256, 64, "prefill: accumulators leave a warp room for 16 rows"},
};

constexpr std::array<const char*, kNumAttentionVariants> kVariants = {
    "StandardVariant", "RopeLlamaVariant", "Fp16Logits<StandardVariant>",
    "Fp16Logits<RopeLlamaVariant>"};

// Keys of one part below which another part costs more than it saves.
constexpr int64 kMinKeysOfDecodePart = 64;
constexpr int64 kMinKeysOfPart = 512;
constexpr int64 kMaxParts = 256;

TileConfig tile_of(const Candidate& candidate, int sm) {
  return attention_tile(candidate.head_dim_qk, candidate.head_dim_vo, candidate.tile_q, sm);
}

int smem_of(const Candidate& candidate, int sm, bool rotates) {
  return attention_smem_bytes(candidate.head_dim_qk, candidate.head_dim_vo, candidate.tile_q, sm,
                              rotates);
}

int64 ceil_div(int64 value, int64 by) {
  return (value + by - 1) / by;
}

// CTAs that run at a time, or as many of them as it takes to keep memory busy: one part more costs
// a partial result.
int64 useful_ctas(const Candidate& candidate, const AttentionGpu& gpu, bool rotates) {
  constexpr int kReserved = 1024;  // bytes that the system takes of each CTA's shared memory
  const TileConfig tile = tile_of(candidate, gpu.sm);
  const int by_smem = gpu.smem_per_sm / (smem_of(candidate, gpu.sm, rotates) + kReserved);
  const int budget =
      attention_ctas_per_sm(candidate.head_dim_qk, candidate.head_dim_vo, candidate.tile_q, gpu.sm);
  int ctas_per_sm = std::clamp(by_smem, 1, budget);
  if (candidate.tile_q == 16) {
    // Measured on an H200: 64 KiB in flight on each SM do; of a single stage half is in flight.
    const int bytes =
        attention_kv_bytes(candidate.head_dim_qk, candidate.head_dim_vo, candidate.tile_q, gpu.sm);
    const int in_flight = tile.stages == 1 ? bytes / 2 : bytes;
    ctas_per_sm = std::min<int>(ctas_per_sm, ceil_div(64 * 1024, in_flight));
  }
  return int64(gpu.num_sms) * ctas_per_sm;
}

// Most keys that the rows of one tile see.
int64 visible_keys(const AttentionProblem& problem, int tile_q) {
  if (problem.window_left < 0) return problem.kv_len;
  const int64 queries = ceil_div(tile_q, problem.num_qo_heads / problem.num_kv_heads) + 1;
  if (problem.causal) return std::min(problem.kv_len, problem.window_left + queries);
  return problem.kv_len;
}

// Parts that the keys of each tile are cut into, so that the CTAs fill the GPU once.
int64 parts_of(const Candidate& candidate, const AttentionProblem& problem, const AttentionGpu& gpu,
               int64 num_tiles) {
  const int64 min_keys = candidate.tile_q == 16 ? kMinKeysOfDecodePart : kMinKeysOfPart;
  const int64 most = visible_keys(problem, candidate.tile_q) / min_keys;
  const int64 wanted = useful_ctas(candidate, gpu, problem.rotates) / num_tiles;
  return std::max<int64>(1, std::min({most, wanted, kMaxParts}));
}

// Whether a tile's CTAs, with the parts that the keys allow, keep every SM busy. Under a causal
// mask tiles differ in length: it takes more of them to even out.
bool fills(const Candidate& candidate, const AttentionProblem& problem, const AttentionGpu& gpu,
           int64 num_tiles) {
  const bool uneven = problem.causal && problem.window_left < 0 && problem.qo_len > 1;
  const int64 parts = parts_of(candidate, problem, gpu, num_tiles);
  return num_tiles * parts > gpu.num_sms * (uneven && 2 * problem.qo_len > problem.kv_len ? 2 : 1);
}

// The dispatcher's words for a configuration, or why it serves none.
Choice choose_attention(const std::string&, const Config& config, int sm) {
  AttentionProblem problem;
  const std::string dtype = config.get("dtype", "float16");
  if (dtype != "float16" && dtype != "bfloat16") {
    return {{}, {"dtype " + dtype + ": expected float16 or bfloat16"}};
  }
  problem.bf16 = dtype == "bfloat16";
  if (problem.bf16 && sm < 80) {
    return {{}, {"dtype bfloat16: GPUs before compute capability 8.0 have no bf16 tensor cores"}};
  }
  problem.head_dim_qk = static_cast<int>(config.get_int("head_dim_qk", 128));
  problem.head_dim_vo = static_cast<int>(config.get_int("head_dim_vo", problem.head_dim_qk));
  for (const int head_dim : {problem.head_dim_qk, problem.head_dim_vo}) {
    if (head_dim % 8 != 0 || head_dim < 8 || head_dim > 256) {
      return {{},
              {"head_dim " + std::to_string(head_dim) + ": expected a multiple of 8, at most 256"}};
    }
  }
  problem.num_qo_heads = config.get_int("num_qo_heads", 32);
  problem.num_kv_heads = config.get_int("num_kv_heads", problem.num_qo_heads);
  if (problem.num_kv_heads < 1 || problem.num_qo_heads < 1 ||
      problem.num_qo_heads % problem.num_kv_heads != 0) {
    return {{}, {"num_qo_heads: expected a multiple of num_kv_heads"}};
  }
  problem.qo_len = std::max(0L, config.get_int("qo_len", 1));
  problem.kv_len = std::max(0L, config.get_int("kv_len", 4096));
  problem.causal = config.get_int("causal", 0) != 0;
  problem.window_left = config.get_int("window_left", -1);
  const std::string mode = config.get("pos_encoding_mode", "NONE");
  if (mode != "NONE" && mode != "ROPE_LLAMA") {
    return {{}, {"pos_encoding_mode " + mode + ": expected NONE or ROPE_LLAMA"}};
  }
  problem.rotates = mode == "ROPE_LLAMA";
  problem.fp16_logits = config.get_int("use_fp16_qk_reduction", 0) != 0;
  if (problem.fp16_logits && problem.bf16) {
    return {{}, {"use_fp16_qk_reduction: expected False unless dtype is float16"}};
  }

  // Why a nominal GPU: the answer is asked for an architecture, and any GPU of it will do.
  const AttentionGpu gpu = {sm,
                            sm >= 90   ? 132
                            : sm == 75 ? 40
                                       : 108,
                            (sm >= 90   ? 228
                             : sm == 80 ? 164
                             : sm == 75 ? 64
                                        : 100) *
                                1024};
  const AttentionPlan plan = plan_attention(problem, gpu);
  Choice choice;
  choice.kernels.push_back(
      attention_name(plan.candidate, problem.bf16, attention_variant(problem)));
  if (plan.num_splits > 1) choice.kernels.push_back(combine_name(problem.bf16));
  return choice;
}

void add_rows(std::vector<Row>& rows, const char* op, int candidate_idx, int variant) {
  const Candidate& candidate = kCandidates[candidate_idx];
  const bool rotates = variant % 2 == 1;
  for (const bool bf16 : {false, true}) {
    if (bf16 && variant >= 2) continue;
    for (const auto& [min_sm, max_sm] : kTileSms) {
      const TileConfig tile = tile_of(candidate, min_sm);
      if (tile.num_warps == 0 || (bf16 && min_sm < 80)) continue;
      rows.push_back({.op = op,
                      .kernel = attention_name(candidate_idx, bf16, variant),
                      .min_sm = min_sm,
                      .max_sm = max_sm,
                      .core = variant == 0,
                      .block = tile.num_warps * 32,
                      .dynamic_smem = smem_of(candidate, min_sm, rotates),
                      .why = candidate.why});
    }
  }
}

std::vector<Row> attention_rows() {
  std::vector<Row> rows;
  for (const char* op : {"single_attention_plain", "single_attention", "single_attention_full"}) {
    for (int candidate = 0; candidate < num_attention_candidates(); ++candidate) {
      for (int variant = 0; variant < kNumAttentionVariants; ++variant) {
        // The narrow op has no options that need another variant.
        if (variant == 0 || std::string(op) == "single_attention_full") {
          add_rows(rows, op, candidate, variant);
        }
      }
    }
    for (const bool bf16 : {false, true}) {
      rows.push_back({.op = op,
                      .kernel = combine_name(bf16),
                      .min_sm = bf16 ? 80 : 75,
                      .block = kCombineThreads,
                      .why = "adds up the parts of split keys"});
    }
  }
  return rows;
}

const RegisterFamily family({{"single_attention_plain", "single_attention",
                              "single_attention_full"},
                             attention_rows,
                             choose_attention});

}  // namespace

int num_attention_candidates() {
  return static_cast<int>(kCandidates.size());
}

std::string attention_name(int candidate, bool bf16, int variant) {
  const Candidate& chosen = kCandidates[candidate];
  const char* type = bf16 ? "__nv_bfloat16" : "__half";
  return kernel_name("attention/portable.cuh:attention", type,
                     kernel_name("HeadDims", chosen.head_dim_qk, chosen.head_dim_vo), chosen.tile_q,
                     kernel_name("StridedKv", type), kVariants[variant]);
}

std::string combine_name(bool bf16) {
  return kernel_name("attention/combine.cuh:combine", bf16 ? "__nv_bfloat16" : "__half");
}

AttentionPlan plan_attention(const AttentionProblem& problem, const AttentionGpu& gpu) {
  const int64 rows = problem.qo_len * (problem.num_qo_heads / problem.num_kv_heads);
  const auto fits = [&](const Candidate& candidate) {
    return problem.head_dim_qk <= candidate.head_dim_qk &&
           problem.head_dim_vo <= candidate.head_dim_vo;
  };
  const auto tiles_of = [&](const Candidate& candidate) {
    return std::max<int64>(1, ceil_div(rows, candidate.tile_q) * problem.num_kv_heads);
  };

  // The smallest tile that holds all rows, or else the largest whose CTAs fill the GPU.
  int chosen = 0;
  while (!fits(kCandidates[chosen])) ++chosen;
  for (int next = chosen + 1; next < num_attention_candidates(); ++next) {
    const Candidate& larger = kCandidates[next];
    if (larger.head_dim_qk != kCandidates[chosen].head_dim_qk ||
        rows <= kCandidates[chosen].tile_q || tile_of(larger, gpu.sm).num_warps == 0) {
      break;
    }
    if (larger.tile_q > 64 && !fills(larger, problem, gpu, tiles_of(larger))) break;
    chosen = next;
  }

  const Candidate& candidate = kCandidates[chosen];
  const auto num_splits = static_cast<int>(parts_of(candidate, problem, gpu, tiles_of(candidate)));
  return {.candidate = chosen,
          .tile_q = candidate.tile_q,
          .block = tile_of(candidate, gpu.sm).num_warps * 32,
          .dynamic_smem = smem_of(candidate, gpu.sm, problem.rotates),
          .num_q_tiles = static_cast<int>(ceil_div(rows, candidate.tile_q)),
          .num_splits = num_splits,
          .in_one_launch = candidate.tile_q == 16 && num_splits <= kMaxPartsOfCta};
}

}  // namespace ridgeline
