// Where the scale of 8-bit numbers comes from: real number = 8-bit number * scale. Shared by the
// kernels and the host.
#pragma once

#include "common/types.h"

namespace ridgeline {

struct QuantScale {
  const float* given;  // given[row * stride], or null: `value`
  float* computed;     // [num_rows], or null: written with max|row| / the largest 8-bit number
  int64 stride;        // elements; 0 when all rows share one scale
  float value;
};

}  // namespace ridgeline
