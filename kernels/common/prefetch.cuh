// Hints that memory will be read soon.
#pragma once

namespace ridgeline {

// Brings the line of an address, which must lie in an allocation, into L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace ridgeline
