// What an attention variant may change, as hooks of a type:
//   mask      the range of keys that a query sees
//   logits    products q * k to logits, when transforms_logits() says so
//   query, key  the tile in shared memory, before the products read it (kTransformsQuery,
//   kTransformsKey) output    the factor on a row's result beside 1 / sum (kTransformsOutput)
// A hook whose flag is off leaves no instruction. `scratch` is kScratchBytes of shared memory that
// prepare() fills.
#pragma once

#include "attention/params.h"
#include "attention/rotation.cuh"
#include "attention/work_item.cuh"
#include "common/fast_math.cuh"

namespace ridgeline {

// cap * tanh(product * scale / cap). Where no logit of this lane is beyond 0.3 * cap, as in most
// steps, by a polynomial that errs by 3e-7 * cap at most: the special functions of the other form
// are what such a step would wait for. (Beyond a factor of 1e5 its coefficients could overflow.)
template <int kCount>
__device__ __forceinline__ void soft_cap(float* products, float scale, float cap) {
  const float factor = scale / cap;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(products[i]));
  if (largest * fabsf(factor) <= 0.3f && fabsf(factor) < 1e5f) {
    const float third = -0.33312109f * factor * factor * scale;
    const float fifth = 0.12640677f * factor * factor * factor * factor * scale;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float square = products[i] * products[i];
      products[i] *= fmaf(square, fmaf(square, fifth, third), scale);
    }
  } else {
    const float twice = factor * (2.0f * kLog2E);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      products[i] = fmaf(reciprocal_fast(1.0f + exp2_fast(products[i] * twice)), -2.0f * cap, cap);
    }
  }
}

// Softmax attention with the causal mask, the sliding window and the soft cap as values known at
// run time.
struct StandardVariant {
  static constexpr bool kTransformsQuery = false;
  static constexpr bool kTransformsKey = false;
  static constexpr bool kFp16Logits = false;
  static constexpr bool kCapsProducts = false;

  static constexpr int scratch_bytes(int /*head_dim_qk*/) { return 0; }

  static __device__ __forceinline__ KeyRange mask(const AttentionParams& params,
                                                  const Request& request, int query) {
    return masked_keys(request, query, params.causal, params.window_left);
  }

  static __device__ __forceinline__ bool transforms_logits(const AttentionParams& params) {
    return ridgeline::transforms_logits(params.sm_scale, params.logits_soft_cap);
  }

  // From products q * k to logits.
  template <int kCount>
  static __device__ __forceinline__ void logits(const AttentionParams& params, float* products) {
    if (params.logits_soft_cap > 0.0f) {
      soft_cap<kCount>(products, params.sm_scale, params.logits_soft_cap);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) products[i] *= params.sm_scale;
    }
  }

  static __device__ __forceinline__ float exponent_scale(const AttentionParams& params) {
    return ridgeline::exponent_scale(params.sm_scale, params.logits_soft_cap);
  }

  // The factor from a row's sums to its result; 0 for a row without a visible key.
  static __device__ __forceinline__ float output(const AttentionParams& /*params*/, float sum) {
    return sum == 0.0f ? 0.0f : reciprocal(sum);
  }
};

// The same for a soft cap in bf16 where caps_products() of params.h says so, and faster there.
struct SoftCapVariant : StandardVariant {
  static constexpr bool kCapsProducts = true;
};

// Rotary embedding as Llama has it, applied here to queries and keys that were stored without it.
struct RopeLlamaVariant : StandardVariant {
  static constexpr bool kTransformsQuery = true;
  static constexpr bool kTransformsKey = true;

  static constexpr int scratch_bytes(int head_dim_qk) { return rotation_table_bytes(head_dim_qk); }

  static __device__ __forceinline__ void prepare(const AttentionParams& params,
                                                 unsigned char* scratch, int thread,
                                                 int num_threads) {
    fill_rotation_table(reinterpret_cast<uint64*>(scratch), params.head_dim_qk / 2,
                        params.rope_turns, params.rope_ratio, thread, num_threads);
  }

  template <typename T, int kDim, typename QueryOfRow>
  static __device__ __forceinline__ void query(const AttentionParams& params,
                                               const Request& request, const unsigned char* scratch,
                                               unsigned char* tile, int num_rows, int thread,
                                               int num_threads, QueryOfRow query_of_row) {
    const int offset = request.kv_len - request.qo_len;
    rotate_rows<T, kDim>(tile, num_rows, params.head_dim_qk,
                         reinterpret_cast<const uint64*>(scratch), thread, num_threads,
                         [&](int row) { return query_of_row(row) + offset; });
  }

  template <typename T, int kDim>
  static __device__ __forceinline__ void key(const AttentionParams& params,
                                             const unsigned char* scratch, unsigned char* tile,
                                             int num_rows, int thread, int num_threads,
                                             int first_token) {
    rotate_rows<T, kDim>(tile, num_rows, params.head_dim_qk,
                         reinterpret_cast<const uint64*>(scratch), thread, num_threads,
                         [&](int row) { return first_token + row; });
  }
};

// Any variant with the products q * k summed in fp16, for fp16 inputs.
template <typename Variant>
struct Fp16Logits : Variant {
  static constexpr bool kFp16Logits = true;
};

}  // namespace ridgeline
