// Activation functions in float32. kExact asks for float32 accuracy; without it the error is below
// a hundredth of an ulp of float16, and the instructions are fewer.
#pragma once

#include "common/fast_math.cuh"

namespace ridgeline {

// exp(-x), x >= 0.
template <bool kExact>
__device__ __forceinline__ float decay(float x) {
  return kExact ? expf(-x) : exp2_fast(-kLog2E * x);
}

// x * sigmoid(2 * half).
template <bool kExact>
__device__ __forceinline__ float sigmoid_gated(float x, float half) {
  // Why exp(-|half|), squared: for a negative half the result is x * exp(2 half) / (1 + exp(2
  // half)), and half the exponent keeps exp clear of overflow and of subnormals wherever the result
  // is not zero.
  const float half_exp = decay<kExact>(fabsf(half));
  const float numerator = half < 0.0f ? x * half_exp * half_exp : x;
  const float denominator = fmaf(half_exp, half_exp, 1.0f);  // from 1 to 2
  return kExact ? numerator / denominator : numerator * reciprocal_fast(denominator);
}

// x * sigmoid(x).
struct Silu {
  template <bool kExact>
  static __device__ __forceinline__ float apply(float x) {
    return sigmoid_gated<kExact>(x, 0.5f * x);
  }
};

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))); the factor is a sigmoid.
struct GeluTanh {
  template <bool kExact>
  static __device__ __forceinline__ float apply(float x) {
    constexpr float kScale = 0.7978845608028654f;
    return sigmoid_gated<kExact>(x, x * fmaf(kScale * 0.044715f, x * x, kScale));
  }
};

// x * Phi(x), Phi being the normal distribution: x / 2 * (1 + erf(x / sqrt(2))).
//
// Phi(-|x|) = exp(-x^2 / 2) * t * Q(t) with t = 1 / (1 + scale |x|), Q a polynomial, the best in
// relative error: so the tail of negative x keeps its digits. kExact: of degree 8, 1.3e-7 on all
// |x| up to 56. Else of degree 6, where |x| ends at 15 for 16-bit types: 2^-24 * (3.6 + 0.45 x^2).
struct Gelu {
  template <bool kExact>
  static __device__ __forceinline__ float apply(float x) {
    if constexpr (kExact) {
      const float t = 1.0f / fmaf(0.28284271247461906f, fabsf(x), 1.0f);
      float q = 0.025031919f;
      q = fmaf(q, t, -0.09100496f);
      q = fmaf(q, t, 0.083705254f);
      q = fmaf(q, t, -0.0019516886f);
      q = fmaf(q, t, 0.0702071f);
      q = fmaf(q, t, 0.08445115f);
      q = fmaf(q, t, 0.10388496f);
      q = fmaf(q, t, 0.11283855f);
      q = fmaf(q, t, 0.112837784f);
      const float half_exp = decay<true>(0.25f * x * x);
      // Why this order: no product is subnormal before the last.
      return x < 0.0f ? x * half_exp * (t * q) * half_exp
                      : x * (1.0f - half_exp * half_exp * (t * q));
    } else {
      // Why a bound: infinity must not meet its own tail, 0. Minus infinity must.
      const float size = fabsf(fminf(x, 15.0f));
      const float t = reciprocal_fast(fmaf(0.26f, size, 1.0f));
      float q = -0.0745713859796524f;
      q = fmaf(q, t, 0.23491336405277252f);
      q = fmaf(q, t, -0.11521349102258682f);
      q = fmaf(q, t, 0.1730077713727951f);
      q = fmaf(q, t, 0.07068052887916565f);
      q = fmaf(q, t, 0.1077076867222786f);
      q = fmaf(q, t, 0.1034754291176796f);
      const float half_exp = exp2_fast(-0.25f * kLog2E * (size * size));
      const float above = x < 0.0f ? 0.0f : x;
      return fmaf(-(size * half_exp), t * q * half_exp, above);
    }
  }
};

}  // namespace ridgeline
