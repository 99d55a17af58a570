// output = input * scale, rounded once, a scale for each group of neighbouring elements of a row or
// one for all.
//
// input of Q (fp8 e4m3, fp8 e5m2 or int8), output of T; layouts: flat.cuh. kVec elements move at
// once: 16 bytes of output, or 1 where a pointer, a stride or the group does not allow that.
// Launch: kFlatThreads threads. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "common/quantized.cuh"
#include "quantization/flat.cuh"

namespace ridgeline {

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kFlatThreads)
    dequantize(const __grid_constant__ DequantizeParams params) {
  const FlatRows& rows = params.rows;
  const Q* input = static_cast<const Q*>(params.input);
  T* output = static_cast<T*>(params.output);
  for (FlatPlace next(rows); next.exists(rows);) {
    Vec<Q, kVec> x[kFlatSlots];
    float scales[kFlatSlots];
    FlatPlace places[kFlatSlots];
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      places[i] = next;
      if (next.exists(rows)) {
        x[i] = load_once<kVec>(input + next.strided<kVec>(rows));
        const int64 group =
            int64{next.row} * params.num_groups + params.vecs_per_group.quotient(next.column);
        scales[i] = params.scales[group * params.scale_stride];
      }
      next.advance(rows);
    }
    pdl_launch_dependents();
#pragma unroll
    for (uint32 i = 0; i < kFlatSlots; ++i) {
      if (!places[i].exists(rows)) continue;
      float values[kVec];
      x[i].to_floats(values);
#pragma unroll
      for (int j = 0; j < kVec; ++j) values[j] *= scales[i];
      Vec<T, kVec> y;
      y.from_floats(values);
      store(output + places[i].contiguous<kVec>(rows), y);
    }
  }
}

}  // namespace ridgeline
