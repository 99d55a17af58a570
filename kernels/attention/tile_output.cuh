// From a warp's sums to memory: final rows and their LSE, or the partial result of a slot.
#pragma once

#include "attention/row_target.cuh"
#include "attention/tile_math.cuh"
#include "common/ldmatrix.cuh"
#include "common/opaque.cuh"
#include "common/swizzle.cuh"

namespace ridgeline {

// A row's sum over the four lanes that hold it.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

template <typename Traits>
__device__ __forceinline__ void store_partial(const AttentionParams& params, const WorkItem& work,
                                              const RowState<Traits>& state, int warp_row,
                                              int own_half, int num_rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      const float sum = quad_sum(state.sum[m][half]);
      if (row >= num_rows) continue;
      const int64 target = int64(work.partial_row) + row;
      if (lane % 4 == 0 && own_half == 0) {
        reinterpret_cast<float2*>(params.partial_stats)[target] =
            make_float2(state.maximum[m][half], sum);
      }
      float* out = params.partial_out + target * uint32(params.head_dim_vo) + 2 * (lane % 4) +
                   own_half * Traits::kOwnVo;
#pragma unroll
      for (int n = 0; n < Traits::kVoFrags; ++n) {
        if (own_half * Traits::kOwnVo + n * 8 < params.head_dim_vo) {
          *reinterpret_cast<float2*>(out + n * 8) =
              make_float2(state.out[m][n][2 * half], state.out[m][n][2 * half + 1]);
        }
      }
    }
  }
}

// A warp's sums, each times its row's factor, to a swizzled tile of its rows.
template <typename Traits>
__device__ __forceinline__ void write_fragments(const RowState<Traits>& state,
                                                const float (&factors)[Traits::kMFrags][2],
                                                uint32 tile) {
  using T = typename Traits::T;
  constexpr int kRowBytes = Traits::kVo * int(sizeof(T));
  const int lane = threadIdx.x % 32;
  const uint32 lane_offset = swizzled_offset<kRowBytes>(lane % 16, lane / 16);
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kVoFrags; n += 2) {
      uint32 matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&four)[4] = state.out[m][n + i / 2];
        const int half = i % 2;
        matrices[i] =
            pack_pair<T>(four[2 * half] * factors[m][half], four[2 * half + 1] * factors[m][half]);
      }
      stmatrix_x4(fragment_address<kRowBytes>(tile, lane_offset, m * 16, n), matrices);
    }
  }
}

// Rows pass through the warp's own rows of the query tile, which nobody reads any more, so that
// they leave as whole 128-byte lines. A lane finds the place of one row, and tells the others.
template <typename Traits>
__device__ __forceinline__ void store_final(const AttentionParams& params, const WorkItem& work,
                                            const RowState<Traits>& state, float scale,
                                            unsigned char* query_tile, int warp_row, int own_half,
                                            int num_rows) {
  using T = typename Traits::T;
  constexpr int kRowBytes = Traits::kVo * int(sizeof(T));
  constexpr int kLines = kRowBytes / 128 / Traits::kSharers;
  constexpr int kPasses = Traits::kMFrags * 4;
  static_assert(kRowBytes <= Traits::kQueryRowBytes, "output rows fit the query's");
  static_assert(Traits::kMFrags <= 2, "a lane for each of the warp's rows");
  const int first_column = own_half * Traits::kOwnVo;
  unsigned char* rows =
      query_tile + warp_row * Traits::kQueryRowBytes + first_column * int(sizeof(T));
  const int lane = threadIdx.x % 32;
  const int64 offset =
      row_target(params, work, min(warp_row + lane, num_rows - 1)).out_offset(params);
  float sum[Traits::kMFrags][2];
  float factors[Traits::kMFrags][2];
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Traits::kMFrags; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      sum[m][half] = quad_sum(state.sum[m][half]);
      const float factor = Traits::Variant::output(params, sum[m][half]);
      factors[m][half] = factor;
      if constexpr (!Traits::kStoresMatrices) {
#pragma unroll
        for (int n = 0; n < Traits::kVoFrags; ++n) {
          *reinterpret_cast<uint32*>(rows + swizzled_offset<kRowBytes>(row, n) + lane % 4 * 4) =
              pack_pair<T>(state.out[m][n][2 * half] * factor,
                           state.out[m][n][2 * half + 1] * factor);
        }
      }
    }
  }
  if constexpr (Traits::kStoresMatrices) write_fragments(state, factors, shared_address(rows));
  __syncwarp();
  if (params.lse != nullptr && own_half == 0) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kMFrags; ++i) {
      const int row = warp_row + i * 8 + lane / 4;
      if (lane % 4 == 0 && row < num_rows) {
        row_target(params, work, row)
            .write_lse(params, scale, state.maximum[i / 2][i % 2], sum[i / 2][i % 2]);
      }
    }
  }
  // Why all reads first: they start together, and no branch parts them.
  uint4 lines[kPasses][kLines];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      lines[pass][line] = *reinterpret_cast<const uint4*>(
          rows + swizzled_offset<kRowBytes>(pass * 4 + lane / 8, line * 8 + lane % 8));
    }
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = pass * 4 + lane / 8;
    T* out = static_cast<T*>(params.out) + __shfl_sync(0xffffffffu, offset, row);
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      const int element = first_column + (line * 8 + lane % 8) * 8;
      if (warp_row + row < num_rows && element < params.head_dim_vo) {
        *reinterpret_cast<uint4*>(out + element) = lines[pass][line];
      }
    }
  }
}

// For warps that divided the keys: adds up their sums in the order of the warps and stores the
// tile's rows, eight at a time. Each warp lays its sums into memory of its own, kPipelineBytes from
// the last warp's.
template <typename Traits>
__device__ __forceinline__ void merge_and_store(const AttentionParams& params, const WorkItem& work,
                                                const RowState<Traits>& state, float scale,
                                                unsigned char* first_sums, int num_rows) {
  using T = typename Traits::T;
  constexpr int kRowBytes = Traits::kVo * int(sizeof(float));
  constexpr int kThreadsOfRow = Traits::kVo / 4;
  __shared__ float2 stats[Traits::kNumPipelines][16];
  // Why opaque: places that a batch's loop over records would hold ready cost its tiles registers.
  const int lane = opaque(int(threadIdx.x % 32));
  const int warp = threadIdx.x / 32;
  const bool final = work.partial_row < 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half * 8 >= num_rows) break;
    if (half > 0) __syncthreads();
    const float own_sum = quad_sum(state.sum[0][half]);
    if (lane % 4 == 0) {
      stats[warp][half * 8 + lane / 4] = make_float2(state.maximum[0][half], own_sum);
    }
#pragma unroll
    for (int n = 0; n < Traits::kVoFrags; ++n) {
      const uint32 offset =
          swizzled_offset<kRowBytes>(lane / 4, 2 * n + lane % 4 / 2) + lane % 2 * 8;
      *reinterpret_cast<float2*>(first_sums + warp * Traits::kPipelineBytes + offset) =
          make_float2(state.out[0][n][2 * half], state.out[0][n][2 * half + 1]);
    }
    __syncthreads();

    const int end = min(8, num_rows - half * 8) * kThreadsOfRow;
#pragma unroll 1
    for (int i = threadIdx.x; i < end; i += Traits::kNumThreads) {
      const int row = half * 8 + i / kThreadsOfRow;
      const int unit = i % kThreadsOfRow;  // of four columns
      float maximum = -kInfinity;
#pragma unroll
      for (int w = 0; w < Traits::kNumPipelines; ++w) maximum = fmaxf(maximum, stats[w][row].x);
      const float origin = maximum == -kInfinity ? 0.0f : maximum;
      float sum = 0.0f;
      float4 values = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < Traits::kNumPipelines; ++w) {
        const float weight = exp2_fast((stats[w][row].x - origin) * scale);
        const float4 four = *reinterpret_cast<const float4*>(
            first_sums + w * Traits::kPipelineBytes + swizzled_offset<kRowBytes>(row % 8, unit));
        sum += weight * stats[w][row].y;
        values.x += weight * four.x;
        values.y += weight * four.y;
        values.z += weight * four.z;
        values.w += weight * four.w;
      }
      const RowTarget target = row_target(params, work, row);
      const int64 partial_row = int64(work.partial_row) + row;
      if (unit == 0) {
        if (final) {
          target.write_lse(params, scale, maximum, sum);
        } else {
          reinterpret_cast<float2*>(params.partial_stats)[partial_row] = make_float2(maximum, sum);
        }
      }
      if (unit * 4 >= params.head_dim_vo) continue;
      if (final) {
        const float factor = Traits::Variant::output(params, sum);
        *reinterpret_cast<uint2*>(target.out<T>(params) + unit * 4) =
            make_uint2(pack_pair<T>(values.x * factor, values.y * factor),
                       pack_pair<T>(values.z * factor, values.w * factor));
      } else {
        *reinterpret_cast<float4*>(params.partial_out + partial_row * uint32(params.head_dim_vo) +
                                   unit * 4) = values;
      }
    }
  }
}

}  // namespace ridgeline
