// packed[i] = bits x[8 i] to x[8 i + 7], the first one lowest ("little") or highest ("big");
// missing ones at the end are 0.
//
// x [num_bits] of bytes, nonzero is a 1, any stride with kVec = 1; kVec = 16 loads 16 bytes at once
// and needs a stride of 1 and an aligned x. A thread owns 16 bits, two bytes of packed. All SMs.
#pragma once

#include "quantization/bits.cuh"
#include "quantization/params.h"

namespace ridgeline {

template <int kVec>
__global__ void __launch_bounds__(kPackThreads)
    packbits(const __grid_constant__ PackbitsParams params) {
  const int64 first = (int64{blockIdx.x} * kPackThreads + threadIdx.x) * 16;
  if (first >= params.num_bits) return;
  uint32 bits = 0;
  if (kVec == 16 && first + 16 <= params.num_bits) {
    bits = sixteen_bits(params.x + first);
  } else {
    for (int i = 0; i < 16 && first + i < params.num_bits; ++i) {
      bits |= static_cast<uint32>(params.x[(first + i) * params.x_stride] != 0) << i;
    }
  }
  params.packed[first / 8] = static_cast<uint8>(ordered(bits & 0xff, params.big));
  if (first + 8 < params.num_bits) {
    params.packed[first / 8 + 1] = static_cast<uint8>(ordered(bits >> 8, params.big));
  }
}

}  // namespace ridgeline
