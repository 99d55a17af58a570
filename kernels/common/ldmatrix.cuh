// ldmatrix.x4: four 8x8 matrices of 16-bit elements from shared memory to a warp's registers. Lane
// l hands in the address of row l % 8 of matrix l / 8, and gets of each matrix the elements (row l
// / 4, columns 2 * (l % 4) and the next), or with `transposed` the elements (rows 2 * (l % 4) and
// the next, column l / 4). stmatrix.x4 (sm_90 on) goes the other way.
#pragma once

#include "common/types.h"

namespace ridgeline {

// The address of a shared-memory object in the 32-bit shared window, as ldmatrix and cp.async take
// it.
__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// The object at an address of that window: one register from step to step in place of two.
__device__ __forceinline__ unsigned char* shared_pointer(uint32 address) {
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ void ldmatrix_x4(uint32 (&matrices)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address));
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32 (&matrices)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address));
}

__device__ __forceinline__ void stmatrix_x4(uint32 address, const uint32 (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

}  // namespace ridgeline
