// Waiting in shared memory for what comes to it (sm_90 on), with no barrier of the threads.
#pragma once

#include "common/types.h"

namespace ridgeline {

// Counts arrivals in rounds: a round ends when so many as init() was told have come.
struct ArrivalCount {
  uint64 state;  // an mbarrier

  __device__ __forceinline__ uint32 address() const {
    return static_cast<uint32>(__cvta_generic_to_shared(&state));
  }
  // By one thread; others may use it behind a barrier.
  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  // What the thread wrote before is there for those who wait.
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // Arrives when all cp.async copies that this thread has started are there.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address())
                 : "memory");
  }
  // Until the end of round 0, 1, 2, ..., of which only the lowest bit counts.
  __device__ __forceinline__ void wait(uint32 round) const {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(address()),
        "r"(round & 1)
        : "memory");
  }
};

// Counts bytes: one thread arrives once a round and says how many it brings, or none, and the round
// ends when they are there.
struct Arrival : ArrivalCount {
  // By one thread; others may use it behind a barrier, this thread's own copies at once.
  __device__ __forceinline__ void init() {
    ArrivalCount::init(1);
    asm volatile(
        "fence.mbarrier_init.release.cluster;\n"
        "fence.proxy.async.shared::cta;" ::
            : "memory");
  }
  __device__ __forceinline__ void expect(uint32 num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(num_bytes)
                 : "memory");
  }
  // wait(), for what other blocks of the cluster send.
  __device__ __forceinline__ void wait_for_cluster(uint32 round) const {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(address()),
        "r"(round & 1)
        : "memory");
  }
};

// One round of `arrival`: copies a multiple of 16 bytes from global memory, by the copy engine. By
// one thread; what was in `shared` has been read.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32 num_bytes,
                                          Arrival& arrival) {
  arrival.expect(num_bytes);
  if (num_bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(static_cast<uint32>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(num_bytes), "r"(arrival.address())
      : "memory");
}

// The same, and what comes is the last that L2 parts with.
__device__ __forceinline__ void bulk_copy_kept(void* shared, const void* global, uint32 num_bytes,
                                               Arrival& arrival) {
  constexpr uint64 kEvictLast = 0x14f0000000000000;  // as createpolicy.fractional makes it
  arrival.expect(num_bytes);
  if (num_bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(static_cast<uint32>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(num_bytes), "r"(arrival.address()), "l"(kEvictLast)
      : "memory");
}

}  // namespace ridgeline
