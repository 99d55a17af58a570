// Copies of 16 bytes from global to shared memory. From sm_80 on they run in the background: a
// thread's copies up to a cp_async_commit() form a group, and cp_async_wait<n>() returns once all
// but its last n groups have arrived. On sm_75 a copy is a load and a store, complete when it
// returns, and commit and wait do nothing.
#pragma once

#include "common/types.h"

namespace ridgeline {

// `keep` false writes zeros and reads nothing; `source` must be a valid address all the same.
__device__ __forceinline__ void cp_async_16(uint32 shared_destination, const void* source,
                                            bool keep) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_destination),
               "l"(source), "r"(keep ? 16 : 0)
               : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (keep) value = __ldg(static_cast<const uint4*>(source));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_destination), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// The same where `once` says that no one reads it again: it leaves the L2 cache before all else
// then, from sm_90 on.
__device__ __forceinline__ void cp_async_16_once(uint32 shared_destination, const void* source,
                                                 bool keep, bool once) {
#if __CUDA_ARCH__ >= 900
  uint64 first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_destination),
               "l"(source), "r"(keep ? 16 : 0), "l"(once ? first : normal)
               : "memory");
#else
  cp_async_16(shared_destination, source, keep);
#endif
}

// Brings the 32 bytes around a word into the first cache; the word itself goes to shared memory, as
// it must somewhere. Nothing on sm_75.
__device__ __forceinline__ void cp_async_cached(uint32 shared_destination, const void* word) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_destination), "l"(word)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kPendingGroups>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
#endif
}

}  // namespace ridgeline
