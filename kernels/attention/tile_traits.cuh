// The shape of one CTA's work on a query tile, derived from the table in params.h.
#pragma once

#include "attention/params.h"
#include "attention/work_item.cuh"
#include "common/arch.cuh"

namespace ridgeline {

template <typename Kv, bool kCountsArrivals>
struct AddressingOf {
  using Type = Kv;
};
template <typename Kv>
struct AddressingOf<Kv, true> {
  using Type = typename Kv::WithPlaces;
};

template <typename T_, typename Dims, int kTileQ_, typename Kv_, typename Variant_,
          bool kWide_ = false>
struct TileTraits {
  using T = T_;  // queries, outputs and the operands of the products
  using Element = typename Kv_::Element;
  using Variant = Variant_;

  static constexpr bool kWide = kWide_;
  static constexpr TileConfig kConfig = attention_tile(Dims::kQk, Dims::kVo, kTileQ_, kSm, kWide);
  static constexpr int kQk = Dims::kQk;
  static constexpr int kVo = Dims::kVo;
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kNumThreads = kConfig.num_warps * 32;
  static constexpr int kStages = kConfig.stages;
  static constexpr bool kQueryInRegisters = kConfig.query_in_registers;

  // Warps either share the keys and divide the rows, or share the rows and divide the keys; in the
  // latter case each has a pipeline of its own. Where they divide the rows, two may share theirs.
  static constexpr bool kSplitsKeys = kConfig.warps_kv > 1;
  static constexpr int kSharers = kConfig.warps_vo;
  static constexpr int kWarpsQ = kConfig.num_warps / kConfig.warps_kv / kSharers;
  static constexpr int kKvTile = kConfig.kv_tile;
  static constexpr int kKeys = kKvTile / kConfig.warps_kv;         // of a step, in one pipeline
  static constexpr int kLoaders = kSplitsKeys ? 32 : kNumThreads;  // threads of a pipeline
  static constexpr int kNumPipelines = kSplitsKeys ? kConfig.warps_kv : 1;
  static constexpr int kMFrags = kTileQ / kWarpsQ / 16;  // fragments of 16 rows a warp
  static constexpr int kOwnKeys = kKeys / kSharers;      // that a warp has the logits of
  static constexpr int kOwnVo = kVo / kSharers;          // columns that it has the sums of
  static constexpr int kKeyFrags = kOwnKeys / 8;
  static constexpr int kVoFrags = kOwnVo / 8;
  // Of a row's groups of 16 elements, the queries that registers hold: all, as many as there is
  // room for, or none.
  static constexpr int kHeldOfSharers = Variant_::kTransformsKey ? 4 : 5;
  static constexpr int kHeldQuery = kQueryInRegisters ? kQk / 16
                                    : kSharers > 1    ? kHeldOfSharers
                                                      : 0;
  // Groups of 16 keys whose exponentials are taken before the products with values start. Why all
  // in some tiles: logits that live on among the products take registers that these do not have.
  static constexpr bool kIsFull =
      kMFrags == 2 &&
      ((kSm >= 90 ? kQk > 128 : kQk != 128) || Variant_::kFp16Logits || Variant_::kTransformsKey);
  static constexpr int kEarlyGroups = kIsFull ? kOwnKeys / 16 : 1;

  // Whether a batch's tiles are one stream (batch_stream.cuh): the next query arrives while this
  // one is in registers.
  static constexpr bool kJoins = kSplitsKeys && kQueryInRegisters && kSm >= 80;

  // Whether warps wait for each other by counting arrivals (tile_arrivals.cuh), with two steps'
  // tiles in shared memory, rather than at barriers.
  static constexpr bool kCountsArrivals = kSm >= 90 && kMFrags == 2 && kStages == 2;
  // Whether results leave by stmatrix, and a row's sum begins with a step's first exponentials: in
  // tall tiles that were compiled and measured so.
  static constexpr bool kStoresMatrices = kCountsArrivals || kSharers > 1;
  // Whether steps are those of tile_capped.cuh.
  static constexpr bool kCapsProducts = kCountsArrivals && Variant_::kCapsProducts;
  using Kv = typename AddressingOf<Kv_, kCountsArrivals>::Type;
  using Places = typename Kv_::WithPlaces;
  static constexpr int kCopiesAt = kQk == 64       ? (kIsFull ? 0 : Places::kCopiesAtOfNarrow)
                                   : kCapsProducts ? Places::kCopiesAtOfCapped
                                   : kIsFull       ? Places::kCopiesAtOfFull
                                                   : Places::kCopiesAt;

  // Shared memory: query tile, then of each pipeline the K stages and the V stages, then the
  // variant's scratch.
  static constexpr int kQueryRowBytes = kQk * int(sizeof(T));
  static constexpr int kKeyRowBytes = kQk * int(sizeof(Element));
  static constexpr int kValueRowBytes = kVo * int(sizeof(Element));
  static constexpr int kQueryBytes = kTileQ * kQueryRowBytes;
  static constexpr int kKeyBytes = kKeys * kKeyRowBytes;
  static constexpr int kValueBytes = kKeys * kValueRowBytes;
  static constexpr int kPipelineBytes = kStages * (kKeyBytes + kValueBytes);
  static constexpr int kScratchOffset = kQueryBytes + kNumPipelines * kPipelineBytes;

  static_assert(kConfig.num_warps > 0, "the table in attention/params.h has no such tile");
  static_assert(kSharers == 1 || (kSharers == 2 && !kSplitsKeys && !kCountsArrivals && kIsFull),
                "warps that share rows do so in pairs, at barriers");
  static_assert(!kSplitsKeys || (kWarpsQ == 1 && kTileQ == 16),
                "warps that divide the keys share 16 rows");
  static_assert(kKeys % 16 == 0 && kQk % 64 == 0 && kVo % 64 == 0,
                "whole fragments and whole lines");
  static_assert(!kCountsArrivals || !kQueryInRegisters, "the query arrives with the first keys");
  static_assert(!kSplitsKeys || kValueBytes >= 8 * kVo * int(sizeof(float)),
                "room to merge eight rows");
};

// Waits for the threads that share a pipeline.
template <typename Traits>
__device__ __forceinline__ void pipeline_barrier() {
  if constexpr (Traits::kSplitsKeys) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace ridgeline
