// What the kernels that pack bits are told. Shared by the kernels and the host.
#pragma once

#include "common/types.h"

namespace ridgeline {

constexpr uint32 kPackThreads = 256;
constexpr uint32 kScanThreads = 1024;
constexpr uint32 kPackRounds = 8;  // 32 bits each, of a warp

struct PackbitsParams {
  const uint8* x;  // [num_bits]; nonzero is a 1
  uint8* packed;   // [ceil(num_bits / 8)]
  int64 x_stride;  // elements
  int64 num_bits;
  bool big;  // the first bit of a byte is its highest
};

struct SegmentPackbitsParams {
  const uint8* x;       // [num_bits]; nonzero is a 1
  const int32* indptr;  // [num_segments + 1], bits
  int32* new_indptr;    // [num_segments + 1], bytes
  uint8* packed;        // [num_bytes]
  int64 x_stride;       // elements
  uint32 num_bits;      // below 2^31
  uint32 num_segments;
  uint32 num_bytes;  // a multiple of 4, at least what the segments need, below 2^31
  bool big;          // the first bit of a byte is its highest
};

}  // namespace ridgeline
