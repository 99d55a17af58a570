// output = input * scale, rounded once: the way back from quantize.cuh, with its layouts, ownership
// and launch. input of Q (fp8 e4m3, fp8 e5m2 or int8), output of T. kVec elements move at once: 16
// bytes of output.
#pragma once

#include "quantization/groups.cuh"

namespace ridgeline {

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kRowMaxThreads)
    dequantize(const __grid_constant__ QuantizeParams params) {
  run_pass<GroupPass<Q, T, kVec, Scaling::kMultiply>>(params);
}

}  // namespace ridgeline
