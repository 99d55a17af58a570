// Programmatic dependent launch. Both calls do nothing below sm_90, and nothing in a kernel that
// was launched without the attribute.
#pragma once

namespace ridgeline {

// Waits until the kernels before this one in the stream are done and their writes are visible.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its prologue. Its own pdl_wait() still waits for all of
// this kernel. An H200 takes 1.2 ns for each block that calls this, so large grids want large
// blocks.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ridgeline
