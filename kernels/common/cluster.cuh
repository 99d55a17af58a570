// Thread block clusters (sm_90 on): who one is, the barrier of all threads of all blocks, and
// stores into another block's shared memory, which count themselves at an Arrival there: whoever
// waits for the bytes it expects needs no barrier, and no other memory access is waited for. A
// block may be written to once it has made its Arrivals and passed a cluster barrier, and must not
// leave before all that is sent to it has come.
#pragma once

#include "common/arrival.cuh"

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

// Stores 16 bytes where block `rank` has what this block has at `local`, aligned to 16 bytes, and
// counts them where it has `arrival`.
__device__ __forceinline__ void send_in_cluster(void* local, const Arrival& arrival, uint32 rank,
                                                uint4 value) {
  const auto address = static_cast<uint32>(__cvta_generic_to_shared(local));
  asm volatile(
      "{\n"
      ".reg .u32 to, at;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[at];\n"
      "}"
      :
      : "r"(address), "r"(arrival.address()), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z),
        "r"(value.w)
      : "memory");
}

}  // namespace ridgeline
