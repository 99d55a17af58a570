// The k elements that find_cut kept, and their indices, in the order of the indices; for k beyond
// what top_k.cuh takes.
//
// input [num_inputs, vocab]; values [num_rows, k] of T and indices [num_rows, k], contiguous. A
// block of kRowThreads threads takes a row and a thread eight neighbours at a time. All SMs.
#pragma once

#include "common/pdl.cuh"
#include "sampling/block.cuh"
#include "sampling/order.cuh"

namespace ridgeline {

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    gather_top_k(const __grid_constant__ GatherParams params) {
  __shared__ BlockScratch scratch;
  constexpr uint32 kShare = 8;
  const RowInput& input = params.input;
  const uint32 row = blockIdx.x;
  const Order order{input.index_bits};
  const T* data = row_data<T>(input, row);
  pdl_wait();
  const uint64 cut = params.cuts[row].cut;
  T* values = static_cast<T*>(params.values) + static_cast<int64>(row) * params.k;
  int64* indices = params.indices + static_cast<int64>(row) * params.k;
  uint64 num_written = 0;
  for (uint32 first = 0; first < input.vocab && num_written < params.k;
       first += kShare * kRowThreads) {
    const uint32 mine = first + threadIdx.x * kShare;
    uint32 kept = 0;
#pragma unroll
    for (uint32 i = 0; i < kShare; ++i) {
      const uint32 index = mine + i;
      if (index < input.vocab && order.composite(to_float(data[index]), index) >= cut) {
        kept |= 1u << i;
      }
    }
    const uint64 count = __popc(kept);
    uint64 place = num_written + sum_before(count, scratch);
    for (; kept != 0 && place < params.k; kept &= kept - 1, ++place) {
      const uint32 index = mine + __ffs(static_cast<int>(kept)) - 1;
      values[place] = data[index];
      indices[place] = index;
    }
    num_written += block_total(count, scratch);
  }
}

}  // namespace ridgeline
