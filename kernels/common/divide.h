// Division by a number that only the host knows, as one multiplication and one shift on the device.
//
// For 0 <= n < 2^31 and 1 <= d < 2^31, with l = ceil(log2 d) and m = ceil(2^(31 + l) / d):
// n / d == (n * m) >> (31 + l) exactly, and m < 2^32.
#pragma once

#include "common/types.h"

namespace ridgeline {

struct Divider {
  uint32 divisor;
  uint32 multiplier;
  uint32 shift;

  constexpr uint32 quotient(uint32 n) const {
    return static_cast<uint32>((static_cast<uint64>(n) * multiplier) >> shift);
  }
  constexpr uint32 remainder(uint32 n) const { return n - quotient(n) * divisor; }
};

constexpr Divider make_divider(uint32 divisor) {
  uint32 log2_ceil = 0;
  while ((uint64{1} << log2_ceil) < divisor) ++log2_ceil;
  const uint64 power = uint64{1} << (31 + log2_ceil);
  return {divisor, static_cast<uint32>((power + divisor - 1) / divisor), 31 + log2_ceil};
}

}  // namespace ridgeline
