// What host and kernels of the attention family agree on: parameters, tile shapes, sizes of shared
// memory.
#pragma once

#include "common/divide.h"
#include "common/types.h"

namespace ridgeline {

// Head dims that a kernel is compiled for. Smaller ones run in the next larger, padded with zeros.
template <int qk, int vo>
struct HeadDims {
  static constexpr int kQk = qk;
  static constexpr int kVo = vo;
};

// Queries of one request against its keys and values. Query heads that share a KV head are packed:
// row r of a KV head's query tiles is query r / group_size, query head kv_head * group_size + r %
// group_size. Strides count elements; pointers and strides are multiples of 16 bytes, the last
// dimension's stride is 1.
struct AttentionParams {
  const void* q;  // [qo_len, num_qo_heads, head_dim_qk]
  const void* k;  // [kv_len, num_kv_heads, head_dim_qk]
  const void* v;  // [kv_len, num_kv_heads, head_dim_vo]
  void* out;      // [qo_len, num_qo_heads, head_dim_vo]
  float* lse;     // [qo_len, num_qo_heads], contiguous, natural logarithm; null: not wanted
  // Results of parts of the keys, when num_splits > 1, for combine(). A slot is one query tile of
  // one KV head and split: slot = (q_tile * num_kv_heads + kv_head) * num_splits + split.
  float* partial_out;    // [num_slots, kTileQ, head_dim_vo], sums that are not yet divided
  float* partial_stats;  // [num_slots, kTileQ, 2]: largest logit, sum of the exponentials
  // Zeros, and zeros again after the launch: parts of each tile and KV head that are done. The CTA
  // that finds all of them there adds them up. Null: combine() does, as a launch of its own.
  int* counters;
  int64 q_stride_token, q_stride_head;
  int64 k_stride_token, k_stride_head;
  int64 v_stride_token, v_stride_head;
  int64 out_stride_token, out_stride_head;
  int qo_len, kv_len;
  int num_qo_heads;
  int head_dim_qk, head_dim_vo;  // multiples of 8, at most HeadDims
  int num_q_tiles;               // ceil(qo_len * group_size / kTileQ)
  int window_left;               // keys to the left of the diagonal that a query sees; -1: all
  int causal;                    // 0 or 1, the diagonal ends at the bottom right corner
  Divider num_kv_heads;
  Divider num_splits;  // parts that the keys of a query tile are cut into
  Divider group_size;  // num_qo_heads / num_kv_heads; qo_len * group_size < 2^31
  float sm_scale;
  float logits_soft_cap;  // 0: off
  // Rotation of the pair (d, d + head_dim_qk / 2) at position p, in turns: p * rope_turns *
  // rope_ratio^d.
  double rope_turns;  // 1 / (2 pi rope_scale)
  double rope_ratio;  // rope_theta^(-2 / head_dim_qk)
};

// Whether logits differ from products q * k by more than the factor that the exponent can apply:
// by a soft cap, or a scale that is negative or next to 0 (the largest logit is searched for among
// products, and a masked one is -inf, which times 0 is no number).
constexpr bool transforms_logits(float sm_scale, float logits_soft_cap) {
  return logits_soft_cap > 0.0f || !(sm_scale > 1e-30f);
}

// Whether all exponentials of a row, in bf16, can have one origin that is known before the first
// (tile_capped.cuh): above 50 the smallest beside the largest would leave float32 no room for
// products with small and large values.
constexpr bool caps_products(float sm_scale, float logits_soft_cap) {
  return logits_soft_cap > 1e-3f && logits_soft_cap <= 50.0f && sm_scale > 1e-30f;
}

// What turns logits, or products q * k where logits are not transformed, to powers of two.
constexpr float exponent_scale(float sm_scale, float logits_soft_cap) {
  const float log2_e = 1.4426950408889634f;
  return transforms_logits(sm_scale, logits_soft_cap) ? log2_e : sm_scale * log2_e;
}

struct CombineParams {
  AttentionParams attention;
  int tile_q;  // kTileQ of the kernel that wrote the parts
};

inline constexpr int kCombineThreads = 256;
inline constexpr int kCombineWarps = kCombineThreads / 32;
// Parts whose sums are added up first, before these groups are.
inline constexpr int kPartsOfGroup = 8;
// A combining warp takes a row; with more parts all warps of a CTA do.
constexpr int combine_ctas(int num_splits, int num_rows) {
  return num_splits > kPartsOfGroup ? num_rows : (num_rows + kCombineWarps - 1) / kCombineWarps;
}
// More parts are too many for the CTA that finishes last: a launch of its own adds them up sooner.
inline constexpr int kMaxPartsOfCta = 34;

// How a CTA works on one query tile.
struct TileConfig {
  int num_warps;  // 0: there is no such kernel
  int warps_kv;   // of them, so many side by side along the KV tile; their results merge at the end
  int kv_tile;    // keys a step
  int stages;     // K tiles, and V tiles, in shared memory
  int ctas_per_sm;  // what the registers are budgeted for
  bool query_in_registers;
  int warps_vo = 1;  // of them, so many share rows (tile_sharing.cuh)
};

// Why these: 16 rows read K and V once and want bytes in flight, so the warps split the keys, each
// with a pipeline of its own that waits for no other warp. 128 rows give a warp 32 rows where the
// accumulators leave room (up to 128 wide): each fragment of K or V that comes from shared memory,
// the narrowest pipe here, then feeds two products; from sm_90 on, which has room for two CTAs with
// two stages, warps meet at no barrier (tile_arrivals.cuh), and 64 wide heads, whose steps are
// short, have a third CTA to cover what a warp waits for. With 256 wide heads two warps share 32
// rows there, each with half of the accumulators. Shared memory stays within 99 KiB from
// sm_80 on, so that one table serves sm_80 to sm_89, and within 64 KiB on sm_75, whose copies do
// not overlap with arithmetic: there one stage does, and small KV tiles leave room for a second
// CTA.
// `wide` tiles are for decodes of about as many requests and KV heads as SMs: one CTA has the warps
// and the bytes in flight of two, and what its warps add up stays in shared memory.
constexpr TileConfig attention_tile(int head_dim_qk, int head_dim_vo, int tile_q, int sm,
                                    bool wide = false) {
  if (wide) {
    const bool exists = head_dim_qk == 128 && head_dim_vo == 128 && tile_q == 16 && sm >= 90;
    return exists ? TileConfig{8, 8, 128, 2, 1, true} : TileConfig{};
  }
  if (head_dim_qk == 64 && head_dim_vo == 64) {
    if (tile_q == 16) return {4, 4, 64, sm == 75 ? 1 : 3, 4, true};
    if (tile_q == 64) return {4, 1, 64, sm == 75 ? 1 : 2, 3, true};
    if (tile_q == 128 && sm >= 90) return {4, 1, 64, 2, 3, false};
    if (tile_q == 128) return {4, 1, sm == 75 ? 64 : 128, 1, 2, false};
  }
  if (head_dim_qk == 128 && head_dim_vo == 128) {
    if (tile_q == 16) return {4, 4, 64, sm == 75 ? 1 : 2, sm == 75 ? 3 : 2, true};
    if (tile_q == 64) return {4, 1, sm == 75 ? 32 : 64, 1, 2, true};
    if (tile_q == 128) {
      return {4, 1, sm == 75 ? 32 : 64, sm >= 90 ? 2 : 1, sm == 75 ? 1 : 2, false};
    }
  }
  if (head_dim_qk == 192 && head_dim_vo == 128) {
    if (tile_q == 16) return {4, 4, 64, sm == 75 ? 1 : 2, 2, true};
    if (tile_q == 64) return {4, 1, sm == 75 ? 32 : 64, 1, 2, false};
    if (tile_q == 128 && sm != 75) return {4, 1, 64, 1, 2, false};
  }
  if (head_dim_qk == 256 && head_dim_vo == 256) {
    if (tile_q == 16 && sm == 75) return {2, 2, 32, 1, 1, false};
    if (tile_q == 16) return {4, 4, 64, 1, 2, false};
    if (tile_q == 64 && sm >= 90) return {4, 1, 64, 1, 2, false, 2};
    if (tile_q == 64) return {4, 1, sm == 75 ? 16 : 64, 1, sm == 75 ? 1 : 2, false};
  }
  return {};
}

constexpr int attention_block_size(int head_dim_qk, int head_dim_vo, int tile_q, int sm,
                                   bool wide = false) {
  return attention_tile(head_dim_qk, head_dim_vo, tile_q, sm, wide).num_warps * 32;
}

// CTAs of an SM that the kernel of one request has registers for. Why not a third in tiles of 128
// rows: it has no memory for its work item.
constexpr int attention_ctas_per_sm(int head_dim_qk, int head_dim_vo, int tile_q, int sm) {
  const int ctas = attention_tile(head_dim_qk, head_dim_vo, tile_q, sm).ctas_per_sm;
  return tile_q == 128 && ctas > 2 ? 2 : ctas;
}

// Bytes that a variant which rotates keeps beside the tiles: the step in phase of each pair.
constexpr int rotation_table_bytes(int head_dim_qk) {
  return head_dim_qk / 2 * int(sizeof(uint64));
}

// Bytes of the K and V tiles of all stages, for elements of 16 bits.
constexpr int attention_kv_bytes(int head_dim_qk, int head_dim_vo, int tile_q, int sm,
                                 bool wide = false) {
  const TileConfig tile = attention_tile(head_dim_qk, head_dim_vo, tile_q, sm, wide);
  return tile.stages * tile.kv_tile * (head_dim_qk + head_dim_vo) * 2;
}

// Dynamic shared memory of a launch, for elements of 16 bits.
constexpr int attention_smem_bytes(int head_dim_qk, int head_dim_vo, int tile_q, int sm,
                                   bool rotates, bool wide = false) {
  return tile_q * head_dim_qk * 2 + attention_kv_bytes(head_dim_qk, head_dim_vo, tile_q, sm, wide) +
         (rotates ? rotation_table_bytes(head_dim_qk) : 0);
}

}  // namespace ridgeline
