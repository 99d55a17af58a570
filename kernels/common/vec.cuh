// kVec neighbouring elements as one value that moves in one memory instruction (16 bytes at most),
// and the conversions between the element types and float32, in which all arithmetic happens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/pack.cuh"
#include "common/types.h"

namespace ridgeline {

// Specialised for the 8-bit types in fp8.cuh and int8.cuh.
template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float<__half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float<__nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Four numbers of an 8-bit type in one register, the first in the lowest byte: specialised beside
// to_float and from_float (fp8.cuh, int8.cuh).
template <class T>
struct Quad;

// The unsigned words that carry kBytes through a load or store.
template <int kBytes>
struct Words;
template <>
struct Words<1> {
  using type = uint8;
};
template <>
struct Words<2> {
  using type = unsigned short;
};
template <>
struct Words<4> {
  using type = uint32;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<16> {
  using type = uint4;
};

template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Vec {
  static constexpr int kBytes = sizeof(T) * kVec;
  // A vector of more than 16 bytes (float32 weights beside 16-bit data) moves in pieces of 16.
  static constexpr int kWordBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / kWordBytes;
  using Word = typename Words<kWordBytes>::type;

  union {
    Word words[kWords];
    T elements[kVec];
  };

  __device__ __forceinline__ Vec() {}

  __device__ __forceinline__ void to_floats(float (&values)[kVec]) const {
    if constexpr (sizeof(T) == 2 && kVec % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        const float2 pair = unpack_pair<T>(reinterpret_cast<const uint32*>(words)[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    } else if constexpr (sizeof(T) == 1 && kVec % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kVec / 4; ++i) {
        float four[4];
        Quad<T>::to_floats(reinterpret_cast<const uint32*>(words)[i], four);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[4 * i + j] = four[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] = to_float(elements[i]);
    }
  }

  // Rounds to nearest even, several elements an instruction where there are as many.
  __device__ __forceinline__ void from_floats(const float (&values)[kVec]) {
    if constexpr (sizeof(T) == 2 && kVec % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        reinterpret_cast<uint32*>(words)[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
      }
    } else if constexpr (sizeof(T) == 1 && kVec % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kVec / 4; ++i) {
        const float four[4] = {values[4 * i], values[4 * i + 1], values[4 * i + 2],
                               values[4 * i + 3]};
        reinterpret_cast<uint32*>(words)[i] = Quad<T>::from_floats(four);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) elements[i] = from_float<T>(values[i]);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Word{};
  }
};

// An ordinary load, cached in L1 and L2: for what several blocks or a second pass read again.
template <int kVec, class T>
__device__ __forceinline__ Vec<T, kVec> load(const T* source) {
  Vec<T, kVec> v;
#pragma unroll
  for (int i = 0; i < v.kWords; ++i) {
    v.words[i] = reinterpret_cast<const typename Vec<T, kVec>::Word*>(source)[i];
  }
  return v;
}

// A load of what this kernel reads once, past L1. Not the read-only path, so that the kernel may
// write the same address later (in-place operators). Why not everywhere: norms, RoPE and
// activations of 16,384 rows take 2 to 4% longer by it (H200).
template <int kVec, class T>
__device__ __forceinline__ Vec<T, kVec> load_once(const T* source) {
  if constexpr (sizeof(T) * kVec == 16) {
    Vec<T, kVec> v;
    uint4& w = v.words[0];
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(source));
    return v;
  } else {
    return load<kVec>(source);
  }
}

// Brings what a later step reads into L2. Why not into registers: they are worth more elsewhere.
__device__ __forceinline__ void prefetch(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

template <int kVec, class T>
__device__ __forceinline__ void store(T* target, const Vec<T, kVec>& v) {
#pragma unroll
  for (int i = 0; i < v.kWords; ++i) {
    reinterpret_cast<typename Vec<T, kVec>::Word*>(target)[i] = v.words[i];
  }
}

// A store that leaves L2 before anything else does: for outputs larger than L2. It is there still
// for the next operator when there is room.
template <int kVec, class T>
__device__ __forceinline__ void store_once(T* target, const Vec<T, kVec>& v) {
#pragma unroll
  for (int i = 0; i < v.kWords; ++i) {
    __stcs(reinterpret_cast<typename Vec<T, kVec>::Word*>(target) + i, v.words[i]);
  }
}

// A store that L2 passes on at once.
template <int kVec, class T>
__device__ __forceinline__ void store_through(T* target, const Vec<T, kVec>& v) {
#pragma unroll
  for (int i = 0; i < v.kWords; ++i) {
    __stwt(reinterpret_cast<typename Vec<T, kVec>::Word*>(target) + i, v.words[i]);
  }
}

}  // namespace ridgeline
