// The SMs that one row of the core table serves: those for which attention_tile() answers alike.
#pragma once

#include <array>

namespace ridgeline {

struct SmRange {
  int min_sm, max_sm;
};

inline constexpr std::array<SmRange, 3> kTileSms = {{{75, 79}, {80, 89}, {90, 999}}};

}  // namespace ridgeline
