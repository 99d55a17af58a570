// Thread block clusters (sm_90 on): who one is, the barrier of all threads of all blocks, and
// stores into another block's shared memory. A block may be written to once it has arrived at a
// barrier, and must not leave before the others are done with it.
#pragma once

#include "common/types.h"

namespace ridgeline {

__device__ __forceinline__ uint32 cluster_rank() {
  uint32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32 cluster_size() {
  uint32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Releases this thread's writes to all blocks; the wait acquires theirs.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores 16 bytes where block `rank` has what this block has at `local`, aligned to 16 bytes.
__device__ __forceinline__ void store_in_cluster(void* local, uint32 rank, uint4 value) {
  const auto address = static_cast<uint32>(__cvta_generic_to_shared(local));
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};\n"
      "}"
      :
      : "r"(address), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

}  // namespace ridgeline
