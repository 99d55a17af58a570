// The SMs that one row of the core table serves: those for which attention_tile() answers alike.
#pragma once

#include <array>
#include <tuple>

#include "attention/params.h"

namespace ridgeline {

struct SmRange {
  int min_sm, max_sm;
};

inline constexpr std::array<SmRange, 3> kTileSms = {{{75, 79}, {80, 89}, {90, 999}}};

constexpr auto fields(const TileConfig& tile) {
  return std::tuple(tile.num_warps, tile.warps_kv, tile.kv_tile, tile.stages, tile.ctas_per_sm,
                    tile.query_in_registers, tile.warps_vo);
}

// A row says what a launch takes on all of its SMs, as its first has it.
constexpr bool answers_alike(const SmRange& sms) {
  for (const int sm : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}) {
    if (sm < sms.min_sm || sm > sms.max_sm) continue;
    for (const int qk : {64, 128, 192, 256}) {
      for (const int vo : {64, 128, 192, 256}) {
        for (const int tile_q : {16, 64, 128}) {
          const auto first = fields(attention_tile(qk, vo, tile_q, sms.min_sm));
          if (fields(attention_tile(qk, vo, tile_q, sm)) != first) return false;
        }
      }
    }
  }
  return true;
}
static_assert(answers_alike(kTileSms[0]) && answers_alike(kTileSms[1]) &&
                  answers_alike(kTileSms[2]),
              "attention_tile() parts SMs that a row of the core table has as one");

}  // namespace ridgeline
