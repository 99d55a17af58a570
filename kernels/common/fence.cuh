// Order among the threads of the GPU.
#pragma once

namespace ridgeline {

// What this thread wrote, or saw written before a barrier of its CTA, is seen by whoever sees what
// it writes after this; and what it reads after this is no older than what it read before.
__device__ __forceinline__ void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

}  // namespace ridgeline
