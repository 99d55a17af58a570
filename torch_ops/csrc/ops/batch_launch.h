// Launches of batched attention: the schedule, and the tiles with what adds up their parts.
#pragma once

#include "ops/batch_inputs.h"

namespace ridgeline {

// Where results go.
struct BatchResults {
  void* out;
  int64_t out_stride_token, out_stride_head;  // elements
  float* lse;                                 // contiguous; null: not wanted
};

// Launches what fills a work list of list_length(of) words.
void launch_schedule(const Lengths& of, const Device& gpu, const Tensor& list);

// Runs attention, with the list of `in` or one of its own.
void launch_attention(const Inputs& in, const Lengths& of, const BatchOptions& options,
                      const Cache& cache, const BatchResults& results);

}  // namespace ridgeline
