// Order among the threads of the GPU, and counters of what they have done.
#pragma once

namespace ridgeline {

// What this thread wrote, or saw written before a barrier of its CTA, is seen by whoever sees what
// it writes after this; and what it reads after this is no older than what it read before.
__device__ __forceinline__ void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Counts up, and returns what was counted before. What the thread reads afterwards is no older than
// what others wrote before they counted.
__device__ __forceinline__ int count_up(int* counter) {
  int before;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

}  // namespace ridgeline
