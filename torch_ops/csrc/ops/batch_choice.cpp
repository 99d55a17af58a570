#include "ops/batch_choice.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>

#include "ops/tile_sms.h"
#include "runtime/names.h"

namespace ridgeline {
namespace {

struct Dims {
  int qk, vo;
};
// A problem takes the first that holds it.
constexpr std::array<Dims, kNumBatchDims> kDims = {{{64, 64}, {128, 128}, {192, 128}, {256, 256}}};

// In one launch, of the rows that a warp adds up. On an H200 calls back to back took, in one launch
// and in two, for 2,048 keys of 8 query heads on one KV head 11.0 and 13.4 us (66 of these), for
// 16,384 of 8 on two 15.9 and 14.7 (133), of 8 on one 26.1 and 14.4 (514).
constexpr int kMaxPartsOfWarp = 136;

// Of requests beside a shared prefix. On an H200 256 of them behind 32,768 keys took, by warps and
// by CTAs, 364 and 379 us with 128 keys of their own, 393 and 402 with 256; behind 65,536 with 512,
// 740 and 760.
constexpr int kFewTiles = 8;

struct Kernels {
  int low, high;
  const char* heights;
  const char* why;
  bool wide = false;
};
constexpr std::array<Kernels, kNumBatchKernels> kKernels = {{
    {16, 16, "Heights<16>", "decode: no request has more than 16 rows"},
    {16, 64, "Heights<16, 64>", "few queries, or heads too wide for 128 rows"},
    {16, 128, "Heights<16, 128>", "prefill, alone or beside decode"},
    {64, 64, "Heights<64>", "where tiles of 16 and 64 rows differ in threads"},
    {16, 16, "WideHeight<16>", "decode of about as many requests and KV heads as SMs", true},
}};
constexpr int kWide = 4;

constexpr std::array<const char*, kNumBatchVariants> kVariants = {
    "StandardVariant", "RopeLlamaVariant", "Fp16Logits<StandardVariant>",
    "Fp16Logits<RopeLlamaVariant>", "SoftCapVariant"};
constexpr int kSoftCap = 4;

TileConfig tile_of(int dims, int tile_q, int sm, bool wide = false) {
  return attention_tile(kDims[dims].qk, kDims[dims].vo, tile_q, sm, wide);
}

TileConfig high_tile_of(int dims, int kernel, int sm) {
  return tile_of(dims, kKernels[kernel].high, sm, kKernels[kernel].wide);
}

bool exists(int dims, int kernel, int sm) {
  const TileConfig low = tile_of(dims, kKernels[kernel].low, sm, kKernels[kernel].wide);
  const TileConfig high = high_tile_of(dims, kernel, sm);
  return low.num_warps > 0 && high.num_warps == low.num_warps;
}

int smem_of(int dims, int kernel, int sm, bool rotates) {
  return batch_smem_bytes(kDims[dims].qk, kDims[dims].vo, kKernels[kernel].low,
                          kKernels[kernel].high, sm, rotates, kKernels[kernel].wide);
}

// Beside dynamic shared memory, of a CTA.
constexpr int kReservedSmem = 1024;

// Whether most SMs have one request's KV head, or half of them where these come in larger teams,
// and none has two. On an H200 16 requests with 8 KV heads took, by wide tiles and by others, 22.3
// and 23.9 us with 1,024 keys each, 66.6 and 68.7 with 4,096, 8 requests of 512 14.0 and 15.4; but
// two of 1,024 13.2 and 12.3, and 64 of 1 to 2,048 with one KV head 19.8 and 18.5: where many CTAs
// share a request, more and smaller ones do that sooner. Why not with batch_invariant: a request's
// bits must not depend on how many others there are. Why the memory of a variant that rotates: a
// list is made without knowing of it.
bool is_for_wide(const BatchProblem& problem, int dims, const BatchGpu& gpu) {
  const int64 num_units = problem.batch_size * problem.num_kv_heads;
  const bool large_teams = problem.num_kv_heads >= 8 && problem.batch_size >= 4;
  const bool enough = large_teams ? 32 * num_units >= 15 * gpu.num_sms  // 64 units of 132 SMs
                                  : 3 * num_units >= 2 * gpu.num_sms;
  return !problem.invariant && enough && num_units <= gpu.num_sms && exists(dims, kWide, gpu.sm) &&
         smem_of(dims, kWide, gpu.sm, true) + kReservedSmem <= gpu.smem_per_sm;
}

int kernel_of(const BatchProblem& problem, int dims, int sm) {
  const int64 rows = problem.max_q_len * (problem.num_qo_heads / problem.num_kv_heads);
  // Why not where no kernel holds 16 rows beside more: a request's tile must not depend on the
  // others.
  const bool mixes = exists(dims, 1, sm) || exists(dims, 2, sm);
  if (rows <= 16 && (mixes || !problem.invariant)) return 0;
  // Why not by size with batch_invariant: a request's tile must not depend on the others' lengths.
  if (exists(dims, 2, sm) && (rows > 64 || problem.invariant)) return 2;
  return exists(dims, 1, sm) ? 1 : 3;
}

// One wave of CTAs. Decode gets as many as keep 128 KiB in flight on each SM, of which a single
// stage has half: with half of that, 64 requests of 4,096 keys in pages of one token took 314 us in
// place of 263 (H200), and more would cut the work into smaller parts.
int num_ctas_of(int dims, int kernel, const BatchGpu& gpu) {
  const Kernels& heights = kKernels[kernel];
  const int by_smem = gpu.smem_per_sm / (smem_of(dims, kernel, gpu.sm, false) + kReservedSmem);
  const int budget = batch_ctas_per_sm(kDims[dims].qk, kDims[dims].vo, heights.low, heights.high,
                                       gpu.sm, heights.wide);
  int per_sm = std::clamp(by_smem, 1, budget);
  if (heights.high == 16) {
    const int bytes = attention_kv_bytes(kDims[dims].qk, kDims[dims].vo, 16, gpu.sm, heights.wide);
    const int in_flight = high_tile_of(dims, kernel, gpu.sm).stages == 1 ? bytes / 2 : bytes;
    per_sm = std::min(per_sm, (128 * 1024 + in_flight - 1) / in_flight);
  }
  return std::min(gpu.num_sms * per_sm, kMaxBatchCtas);
}

int dims_of(int head_dim_qk, int head_dim_vo) {
  int dims = 0;
  while (kDims[dims].qk < head_dim_qk || kDims[dims].vo < head_dim_vo) ++dims;
  return dims;
}

// Whether a kernel has tiles that SoftCapVariant is for (tile_capped.cuh).
bool has_soft_cap(int dims, int kernel, bool bf16, int sm) {
  return kernel == 2 && dims == 1 && bf16 && sm >= 90;
}

int variant_of(const BatchProblem& problem, int dims, int kernel, int sm) {
  if (problem.rotates || problem.fp16_logits) {
    return (problem.rotates ? 1 : 0) + (problem.fp16_logits ? 2 : 0);
  }
  return problem.caps && has_soft_cap(dims, kernel, problem.bf16, sm) ? kSoftCap : 0;
}

bool is_low(const BatchProblem& problem) {
  return problem.max_q_len * (problem.num_qo_heads / problem.num_kv_heads) <= 16;
}

// Whether there is a kernel for a pair, of low tiles or others in the second segment. Why not all:
// some spill, with tiles of 128 rows beside others.
bool pair_exists(int dims, int kernel, bool paged, bool low_b, int sm) {
  if (!exists(dims, kernel, sm) || (kernel == 3 && exists(dims, 1, sm))) return false;
  return kernel != 2 || (dims > 0 && (low_b || paged || dims > 1));
}

// The kernel of a pair's first segment, for the longest query of both: it holds 16 rows too, where
// there is such a kernel.
int kernel_of_pair(const BatchProblem& a, const BatchProblem& b, int dims, int sm) {
  const int64 rows = std::max(a.max_q_len, b.max_q_len) * (a.num_qo_heads / a.num_kv_heads);
  if (rows > 64 && pair_exists(dims, 2, a.paged, is_low(b), sm)) return 2;
  return exists(dims, 1, sm) ? 1 : 3;
}

// Whether a second segment of at most 16 rows can have the kernel for these beside another.
bool low_fits(int dims, int kernel, int sm) {
  return tile_of(dims, 16, sm).num_warps == tile_of(dims, kKernels[kernel].high, sm).num_warps;
}

int kernel_of_second(const BatchProblem& b, int dims, int kernel, int sm) {
  return is_low(b) && low_fits(dims, kernel, sm) ? 0 : kernel;
}

Choice choose_batch(const std::string& op, const Config& config, int sm) {
  if (op == "attention_schedule") return {{schedule_name(false), schedule_name(true)}, {}};
  if (op == "attention_pair_schedule") return {{schedule_name(true, 2)}, {}};
  BatchProblem problem;
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
  problem.max_q_len = std::max(1L, config.get_int("max_q_len", 1));
  problem.num_tokens = problem.max_q_len;
  problem.paged = config.get_int("paged", 1) != 0;
  problem.invariant = config.get_int("batch_invariant", 0) != 0;
  const std::string mode = config.get("pos_encoding_mode", "NONE");
  if (mode != "NONE" && mode != "ROPE_LLAMA") {
    return {{}, {"pos_encoding_mode " + mode + ": expected NONE or ROPE_LLAMA"}};
  }
  problem.rotates = mode == "ROPE_LLAMA";
  const double cap = std::strtod(config.get("logits_soft_cap", "0").c_str(), nullptr);
  problem.caps = caps_products(1.0f, static_cast<float>(cap));
  const int dims = dims_of(problem.head_dim_qk, problem.head_dim_vo);
  if (op == "attention_pair") {
    // Of many queries beside decodes, unless told otherwise.
    problem.max_q_len = std::max(1L, config.get_int("max_q_len", 1024));
    BatchProblem second = problem;
    second.max_q_len = std::max(1L, config.get_int("max_q_len_b", 1));
    const int kernel = kernel_of_pair(problem, second, dims, sm);
    return {{schedule_name(true, 2),
             pair_name(dims, kernel, problem.paged, kernel_of_second(second, dims, kernel, sm),
                       problem.bf16),
             pair_combine_name(problem.bf16)},
            {}};
  }
  const int kernel = kernel_of(problem, dims, sm);
  const int variant = variant_of(problem, dims, kernel, sm);
  Choice choice = {{schedule_name(kKernels[kernel].high > 16),
                    batch_name(dims, kernel, problem.paged, problem.bf16, variant),
                    batch_combine_name(problem.bf16)},
                   {}};
  // Which of the two a call takes follows from its batch size and the GPU.
  if (kernel == 0 && !problem.invariant && exists(dims, kWide, sm)) {
    choice.kernels.push_back(batch_name(dims, kWide, problem.paged, problem.bf16, variant));
  }
  return choice;
}

void add_rows(std::vector<Row>& rows, const std::string& op, int dims, int kernel, int variant) {
  for (const bool paged : {true, false}) {
    for (const bool bf16 : {false, true}) {
      if (bf16 && (variant == 2 || variant == 3)) continue;
      for (const auto& [min_sm, max_sm] : kTileSms) {
        if (!exists(dims, kernel, min_sm) || (bf16 && min_sm < 80)) continue;
        if (kernel == 3 && exists(dims, 1, min_sm)) continue;
        if (variant == kSoftCap && !has_soft_cap(dims, kernel, bf16, min_sm)) continue;
        rows.push_back({.op = op,
                        .kernel = batch_name(dims, kernel, paged, bf16, variant),
                        .min_sm = min_sm,
                        .max_sm = max_sm,
                        .core = variant == 0 || variant == kSoftCap,
                        .block = high_tile_of(dims, kernel, min_sm).num_warps * 32,
                        .dynamic_smem = smem_of(dims, kernel, min_sm, variant % 2 == 1),
                        .why = kKernels[kernel].why});
      }
    }
  }
}

// In the packs: what POD and shared prefixes of many queries take, beside decodes.
void add_pair_rows(std::vector<Row>& rows, int dims, int kernel, int kernel_b) {
  for (const bool paged : {true, false}) {
    for (const bool bf16 : {false, true}) {
      for (const auto& [min_sm, max_sm] : kTileSms) {
        if (!pair_exists(dims, kernel, paged, kernel_b == 0, min_sm)) continue;
        if (bf16 && min_sm < 80) continue;
        if (kernel_b == 0 && !low_fits(dims, kernel, min_sm)) continue;
        rows.push_back({.op = "attention_pair",
                        .kernel = pair_name(dims, kernel, paged, kernel_b, bf16),
                        .min_sm = min_sm,
                        .max_sm = max_sm,
                        .core = kernel_b == 0 && (dims == 0 || (dims == 1 && kernel == 2)),
                        .block = high_tile_of(dims, kernel, min_sm).num_warps * 32,
                        .dynamic_smem = smem_of(dims, kernel, min_sm, false),
                        .why = "two batches in one launch"});
      }
    }
  }
}

void add_pair_rows(std::vector<Row>& rows) {
  rows.push_back({.op = "attention_pair_schedule",
                  .kernel = schedule_name(true, 2),
                  .block = schedule_threads(true),
                  .why = "lengths of two batches to one work list"});
  for (int dims = 0; dims < kNumBatchDims; ++dims) {
    for (const int kernel : {1, 2, 3}) {
      add_pair_rows(rows, dims, kernel, 0);
      add_pair_rows(rows, dims, kernel, kernel);
    }
  }
  for (const bool bf16 : {false, true}) {
    rows.push_back({.op = "attention_pair",
                    .kernel = pair_combine_name(bf16),
                    .min_sm = bf16 ? 80 : 75,
                    .block = kCombineThreads,
                    .why = "adds up the parts of cut tiles"});
  }
}

std::vector<Row> batch_rows() {
  std::vector<Row> rows;
  add_pair_rows(rows);
  for (const bool tall : {false, true}) {
    rows.push_back({.op = "attention_schedule",
                    .kernel = schedule_name(tall),
                    .block = schedule_threads(tall),
                    .why = tall ? "lengths to a balanced work list, tiles of any height"
                                : "the same for tiles of 16 rows"});
  }
  for (const std::string op : {"attention", "attention_plain", "attention_lse",
                               "attention_plain_lse", "attention_full", "attention_out"}) {
    for (int dims = 0; dims < kNumBatchDims; ++dims) {
      for (int kernel = 0; kernel < kNumBatchKernels; ++kernel) {
        for (int variant = 0; variant < kNumBatchVariants; ++variant) {
          if (variant == 0 || op == "attention_full" || op == "attention_out") {
            add_rows(rows, op, dims, kernel, variant);
          }
        }
      }
    }
    for (const bool bf16 : {false, true}) {
      rows.push_back({.op = op,
                      .kernel = batch_combine_name(bf16),
                      .min_sm = bf16 ? 80 : 75,
                      .block = kCombineThreads,
                      .why = "adds up the parts of cut tiles"});
    }
  }
  return rows;
}

const RegisterFamily family({{"attention", "attention_plain", "attention_lse",
                              "attention_plain_lse", "attention_full", "attention_out",
                              "attention_schedule", "attention_pair", "attention_pair_schedule"},
                             batch_rows,
                             choose_batch});

}  // namespace

std::string schedule_name(bool tall, int num_segments) {
  const char* const kernel = "attention/schedule.cuh:schedule";
  const char* const is_tall = tall ? "true" : "false";
  return num_segments == 1 ? kernel_name(kernel, is_tall)
                           : kernel_name(kernel, is_tall, num_segments);
}

std::string batch_name(int dims, int kernel, bool paged, bool bf16, int variant) {
  const char* type = bf16 ? "__nv_bfloat16" : "__half";
  return kernel_name("attention/batch.cuh:batch_attention", type,
                     kernel_name("HeadDims", kDims[dims].qk, kDims[dims].vo),
                     kKernels[kernel].heights, kernel_name(paged ? "PagedKv" : "RaggedKv", type),
                     kVariants[variant]);
}

std::string pair_name(int dims, int kernel, bool paged, int kernel_b, bool bf16) {
  const char* type = bf16 ? "__nv_bfloat16" : "__half";
  const auto segment = [&](int of, const char* kv) {
    return kernel_name("Segment", kKernels[of].heights, kernel_name(kv, type));
  };
  return kernel_name("attention/batch_pair.cuh:batch_attention_pair", type,
                     kernel_name("HeadDims", kDims[dims].qk, kDims[dims].vo),
                     segment(kernel_b, "PagedKv"), segment(kernel, paged ? "PagedKv" : "RaggedKv"),
                     kVariants[0]);
}

std::string batch_combine_name(bool bf16) {
  return kernel_name("attention/batch_combine.cuh:batch_combine",
                     bf16 ? "__nv_bfloat16" : "__half");
}

std::string pair_combine_name(bool bf16) {
  return kernel_name("attention/batch_combine.cuh:batch_combine_pair",
                     bf16 ? "__nv_bfloat16" : "__half");
}

std::array<int, 2> heights_of(int kernel) {
  return {kKernels[kernel].low, kKernels[kernel].high};
}

// Costs in quarters of the time that a CTA takes for 64 keys of a decoding tile. On an H200 with
// both kinds in one launch that is 1.4 us, 64 keys of a 128-row tile take 3.9, and a tile of 128
// rows 5.3 us beside its keys; with 7 in place of 11 the decodes of a mixed batch waited for its
// prefills (828 us, 669). A decoding tile costs 3.5 us beside its keys; with 8 in place of 10 a
// cascade waited for its decodes (465 us, 456; one of 64 requests 100 us, 86). Beside a wide tile's
// keys its SM has nothing else to do: with 18 in place of 10 batches of unequal lengths take 1.1%
// less (171 of them on an H200), at best 12%.
TileHeight tile_height(int dims, int tile_q, int sm, bool wide) {
  const int kv_tile = tile_of(dims, tile_q, sm, wide).kv_tile;
  const int per_64_keys = tile_q == 16 ? 4 : tile_q == 64 ? 8 : 11;
  const bool tall = tile_q > 16;
  const int step_cost = std::max(1, per_64_keys * kv_tile / 64);
  return {.tile_q = make_divider(static_cast<uint32>(tile_q)),
          .kv_tile = make_divider(static_cast<uint32>(kv_tile)),
          .step_cost = step_cost,
          .steps_of_cost = make_divider(static_cast<uint32>(step_cost)),
          .tile_cost = wide           ? 18
                       : tile_q == 16 ? 10
                       : tile_q == 64 ? 14
                                      : 19,
          .min_kv_tiles = tall ? std::max(1, 512 / kv_tile) : 1};
}

namespace {

// Whether the CTA that finishes a cut tile last adds up its parts, of which it may have so many.
bool adds_up_parts(const BatchProblem& problem, const TileConfig& tile, int slot_rows,
                   int num_teams) {
  const int64 most_parts = std::min<int64>(num_teams + 1, problem.max_keys / tile.kv_tile + 1);
  const int rows_of_warp = (slot_rows + tile.num_warps - 1) / tile.num_warps;
  return most_parts * rows_of_warp <= kMaxPartsOfWarp;
}

struct Teams {
  int num_ctas;  // of all
  int size;
};

// Teams of as many CTAs as divide both these and the KV heads. Where hardly any CTA is left over,
// wide tiles get teams of all heads, and other decodes do if two CTAs fit an SM and the requests
// share out evenly: with 32 on an H200 16 requests of 4,096 keys in pages of one token took 250 us
// in place of 257, and one of 1,024 keys 13.5 in place of 14.2; but 33 of 300 keys, which 33 teams
// of 8 share evenly, 47.3 in place of 45.3.
Teams teams_of(const BatchProblem& problem, const Kernels& heights, int num_ctas, int num_sms) {
  const auto num_heads = static_cast<int>(problem.num_kv_heads);
  const int64 num_teams = num_ctas / num_heads;
  const int left_over = num_ctas % num_heads;
  const int64 batch_size = std::max<int64>(1, problem.batch_size);
  const bool share_evenly =
      num_teams > 0 && (batch_size % num_teams == 0 || num_teams % batch_size == 0);
  const bool may = heights.wide || (heights.high == 16 && num_ctas >= 2 * num_sms && share_evenly);
  if (may && num_teams > 0 && 32 * left_over <= num_ctas) {
    return {num_ctas - left_over, num_heads};
  }
  return {num_ctas, std::gcd(num_ctas, num_heads)};
}

BatchPlan plan_of(const BatchProblem& problem, int dims, int kernel, const BatchGpu& gpu) {
  const Kernels& heights = kKernels[kernel];
  const int64 group_size = problem.num_qo_heads / problem.num_kv_heads;
  const auto [num_ctas, team_size] =
      teams_of(problem, heights, num_ctas_of(dims, kernel, gpu), gpu.num_sms);
  const int num_teams = num_ctas / team_size;
  const int tallest_part = problem.invariant ? 16 : heights.high;
  const auto slot_rows = static_cast<int>(
      std::min<int64>(tallest_part, std::max<int64>(1, problem.max_q_len * group_size)));
  const ListLayout layout = list_layout(problem.batch_size, problem.num_tokens, group_size,
                                        problem.num_kv_heads, problem.invariant);
  const int64 slots =
      problem.invariant ? layout.max_items * problem.num_kv_heads : int64{2} * num_ctas;
  const int64 max_tiles = problem.batch_size + problem.num_tokens * group_size / heights.high;
  const bool by_tile = heights.high > 16 && !problem.invariant && max_tiles < kMaxTilesByTile;
  const bool may_split = by_tile && gpu.sm >= 90 && heights.low < heights.high &&
                         max_tiles * problem.num_kv_heads >= 3 * num_ctas;
  // Why so few: each of the tiles of 16 rows reads all of the keys again.
  const int max_split = may_split ? gpu.num_sms / 8 : 0;
  // Beyond a range a team, for lists in even parts: of two CTAs on an SM one is done before the
  // other, and takes more.
  const int64 most_ranges =
      std::max<int64>(2 * num_teams, max_tiles * problem.num_kv_heads / team_size);
  const bool may_be_even = by_tile && num_ctas == 2 * gpu.num_sms;
  return {.dims = dims,
          .kernel = kernel,
          .low = heights.low,
          .high = heights.high,
          .wide = heights.wide,
          .block = high_tile_of(dims, kernel, gpu.sm).num_warps * 32,
          .dynamic_smem = smem_of(dims, kernel, gpu.sm, problem.rotates),
          .num_sms = gpu.num_sms,
          .num_ctas = num_ctas,
          .team_size = team_size,
          .max_tiles = by_tile ? static_cast<int>(max_tiles) : 0,
          .max_split = max_split,
          .max_ranges = may_be_even ? static_cast<int>(std::min<int64>(most_ranges, kMaxBatchCtas))
                                    : num_teams,
          .few_tiles = 0,
          .slot_rows = slot_rows,
          .num_partial_rows = slots * slot_rows + heights.high,
          .in_one_launch =
              heights.high == 16 && !problem.invariant &&
              adds_up_parts(problem, high_tile_of(dims, kernel, gpu.sm), slot_rows, num_teams)};
}

}  // namespace

BatchPlan plan_batch(const BatchProblem& problem, const BatchGpu& gpu) {
  const int dims = dims_of(problem.head_dim_qk, problem.head_dim_vo);
  const int kernel = kernel_of(problem, dims, gpu.sm);
  return plan_of(problem, dims, kernel == 0 && is_for_wide(problem, dims, gpu) ? kWide : kernel,
                 gpu);
}

int batch_variant(const BatchProblem& problem, const BatchPlan& plan, int sm) {
  return variant_of(problem, plan.dims, plan.kernel, sm);
}

PairPlan plan_pair(const BatchProblem& a, const BatchProblem& b, const BatchGpu& gpu) {
  const int dims = dims_of(a.head_dim_qk, a.head_dim_vo);
  const int kernel = kernel_of_pair(a, b, dims, gpu.sm);
  BatchProblem both = a;
  both.batch_size += b.batch_size;
  both.num_tokens += b.num_tokens;
  both.max_q_len = std::max(a.max_q_len, b.max_q_len);
  PairPlan plan = {plan_of(both, dims, kernel, gpu), kernel_of_second(b, dims, kernel, gpu.sm)};
  if (batch_fits_warps(kDims[dims].qk, kDims[dims].vo, kKernels[plan.kernel_b].high,
                       kKernels[kernel].high, gpu.sm)) {
    plan.both.few_tiles = kFewTiles;
  }
  return plan;
}

}  // namespace ridgeline
