// Rows that are read once, reduced and written: the body of the norms and of quantization.
//
// A team of threads owns a row: lanes of one warp when rows are short, a warp, or a block
// (row_plan.h). Thread t of a team of size n owns vectors t, t + n, t + 2n, ... A row stays in
// registers from the first reduction to the store, so that memory is read once; what does not fit
// is read again by every step. All arithmetic is in float32, and what is stored is rounded once.
//
// What varies is a `Pass`:
// - kVec, and Element, what is stored;
// - Row(params, row_idx): where a row comes from.
//     fetch(vec_idx) -> Fetched: issues the loads of a vector and does nothing else;
//     take(fetched, vec_idx): the vector (a fused add stores the residual here);
//     reload(vec_idx): the same vector again;
// - Columns(params, vec_idx): what is the same for all rows, such as weights; loaded with the row
//   where kHeld says so or a thread keeps few vectors, else where they are used, after
//   prefetch(params, vec_idx);
// - kMoments: what the transformation needs to know of the whole row;
// - transform(params, moments, columns, values): what is stored, but for its scale;
// - weigh(params, columns, values), of kRootMeanSquare alone: the same but for the inverse root;
// - output_offset(params, row_idx): where to, in elements;
// - kScaling: whether a number of each row's own (QuantScale) multiplies or divides the result.
#pragma once

#include "common/fast_math.cuh"
#include "common/pdl.cuh"
#include "common/quant_scale.h"
#include "common/quantized.cuh"
#include "common/reduce.cuh"
#include "common/row_plan.h"
#include "common/vec.cuh"

namespace ridgeline {

enum class MomentsOf { kNothing, kRootMeanSquare, kMeanAndVariance };
enum class Scaling { kNone, kDivide, kMultiply };

struct Moments {
  float mean;
  float inverse_root;  // 1 / sqrt(mean square, or variance, + eps)
};

// A compile-time flag as an argument.
template <bool kFlag>
struct Constant {
  static constexpr bool kValue = kFlag;
};

// Threads of one row, and the rows of a thread.
struct Team {
  uint32 size;
  uint32 rank;
  uint32 first_row;
  uint32 row_step;
};

// What a team is made of. The registers of lanes and of a block hold whole rows.
enum class TeamOf {
  kLanes,        // of one warp, with other teams; the last ones may have no row
  kBlock,        // whose threads all have a first vector
  kWarpOrBlock,  // any row: what does not fit is read again
};

template <class Op, int kStep, TeamOf kTeam, int kRows>
__device__ __forceinline__ void team_reduce(float (&x)[kRows], const Team& team) {
  if constexpr (kTeam == TeamOf::kLanes) {
    group_reduce<Op>(x, team.size);
  } else if (kTeam == TeamOf::kWarpOrBlock && team.size == kWarpSize) {
    x[0] = warp_reduce<Op>(x[0]);
  } else {
    __shared__ float4 of_warps[kRowMaxThreads / kWarpSize / 4];  // an array for each step
    x[0] = block_reduce<Op>(x[0], of_warps);
  }
}

// A sum and a maximum at once.
template <TeamOf kTeam, int kRows>
__device__ __forceinline__ void team_reduce(float (&sums)[kRows], float (&largest)[kRows],
                                            const Team& team) {
  if constexpr (kTeam == TeamOf::kLanes) {
    group_reduce<Sum>(sums, team.size);
    group_reduce<Largest>(largest, team.size);
  } else if (kTeam == TeamOf::kWarpOrBlock && team.size == kWarpSize) {
    sums[0] = warp_reduce<Sum>(sums[0]);
    largest[0] = warp_reduce<Largest>(largest[0]);
  } else {
    __shared__ float4 sums_of_warps[kRowMaxThreads / kWarpSize / 4];
    __shared__ float4 largest_of_warps[kRowMaxThreads / kWarpSize / 4];
    put_of_warp<Sum>(sums[0], sums_of_warps);
    put_of_warp<Largest>(largest[0], largest_of_warps);
    __syncthreads();
    sums[0] = of_warps<Sum>(sums_of_warps);
    largest[0] = of_warps<Largest>(largest_of_warps);
  }
}

// A scale that no row of finite numbers overflows, and whose inverse is a normal number.
__device__ __forceinline__ float scale_for(float largest, float largest_representable) {
  constexpr float kMaxFloat = 3.4028235e38f, kMinNormal = 1.1754944e-38f;
  return fmaxf(fminf(largest, kMaxFloat) * (1.0f / largest_representable), kMinNormal);
}

// kRows rows of kHeld vectors in a thread's registers.
template <class Pass, int kRows, int kHeld, TeamOf kTeam, class Params>
__device__ __forceinline__ void run_team(const Params& params, const Team& team) {
  using Row = typename Pass::Row;
  using Element = typename Pass::Element;
  using Columns = typename Pass::Columns;
  constexpr int kVec = Pass::kVec;
  constexpr bool kHoldsRow = kTeam != TeamOf::kWarpOrBlock;
  const RowShape& shape = params.shape;
  const uint32 num_vecs = shape.num_vecs;
  const uint32 first_unheld = team.rank + kHeld * team.size;

  // All loads first: the rows, and the columns that only the transformation needs.
  Row rows[kRows];
  bool valid[kRows];
  typename Row::Fetched fetched[kRows][kHeld];
  Columns columns[kHeld];
  constexpr bool kHoldsColumns = Columns::kHeld || (kHoldsRow && kHeld <= kRowSlots);
  const auto has = [&](int i, int j) {
    return (kTeam == TeamOf::kBlock && j == 0) ||
           (valid[i] && team.rank + j * team.size < num_vecs);
  };
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const uint32 row_idx = team.first_row + i * team.row_step;
    valid[i] = kTeam != TeamOf::kLanes || row_idx < shape.num_rows;
    rows[i] = Row(params, valid[i] ? row_idx : 0);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const uint32 vec_idx = team.rank + j * team.size;
      if (has(i, j)) fetched[i][j] = rows[i].fetch(vec_idx);
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const uint32 vec_idx = team.rank + j * team.size;
    if (!(kTeam == TeamOf::kBlock && j == 0) && vec_idx >= num_vecs) continue;
    if constexpr (kHoldsColumns) {
      columns[j] = Columns(params, vec_idx);
    } else if (gridDim.x <= kRowFewBlocks) {
      // Later blocks find them in L1.
      Columns::prefetch(params, vec_idx);
    }
  }
  float factor[kRows];
  bool computes = false;
  if constexpr (Pass::kScaling != Scaling::kNone) {
    const QuantScale& scale = params.scale;
    computes = Pass::kScaling == Scaling::kDivide && scale.computed != nullptr;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      factor[i] = scale.value;
      if (scale.given != nullptr && valid[i]) {
        factor[i] = scale.given[(team.first_row + i * team.row_step) * scale.stride];
      }
      if (Pass::kScaling == Scaling::kDivide) factor[i] = reciprocal(factor[i]);
    }
  }
  const auto output_of = [&](int i) {
    const uint32 row_idx = team.first_row + i * team.row_step;
    return static_cast<Element*>(params.output) + Pass::output_offset(params, row_idx);
  };
  // While the loads are on their way, where there are registers for it.
  constexpr bool kKnowsOutput = kTeam == TeamOf::kBlock ||
                                (kTeam == TeamOf::kWarpOrBlock && Pass::kScaling == Scaling::kNone);
  Element* const output = kKnowsOutput ? output_of(0) : nullptr;
  pdl_launch_dependents();

  typename Row::Vector x[kRows][kHeld];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const uint32 vec_idx = team.rank + j * team.size;
      if (has(i, j)) x[i][j] = rows[i].take(fetched[i][j], vec_idx);
    }
  }

  // Calls use(i, vec_idx, columns, values) for every vector of this thread.
  const auto for_each_vector = [&](auto is_first, const auto& use) {
    [[maybe_unused]] constexpr bool kFirst = decltype(is_first)::kValue;
    float values[kVec];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const uint32 vec_idx = team.rank + j * team.size;
        if (has(i, j)) {
          x[i][j].to_floats(values);
          use(i, vec_idx, kHoldsColumns ? columns[j] : Columns(params, vec_idx), values);
        }
      }
    }
    if constexpr (!kHoldsRow) {
      for (uint32 vec_idx = first_unheld; vec_idx < num_vecs; vec_idx += team.size) {
        const typename Row::Vector again =
            kFirst ? rows[0].take(rows[0].fetch(vec_idx), vec_idx) : rows[0].reload(vec_idx);
        again.to_floats(values);
        use(0, vec_idx, Columns(params, vec_idx), values);
      }
    }
  };

  // What a row is divided by, from its largest number.
  const auto set_scale = [&](int i, float largest) {
    const float scale = scale_for(largest, kLargest<Element>);
    factor[i] = reciprocal(scale);
    if (valid[i] && team.rank == 0) {
      params.scale.computed[team.first_row + i * team.row_step] = scale;
    }
  };
  // Why not streaming stores: the next operator reads the output, from L2 when it fits.
  const auto put = [&](int i, uint32 vec_idx, float (&v)[kVec]) {
    if constexpr (Pass::kScaling != Scaling::kNone) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) v[k] *= factor[i];
    }
    Vec<Element, kVec> y;
    y.from_floats(v);
    store((kKnowsOutput ? output : output_of(i)) + vec_idx * kVec, y);
  };

  Moments moments[kRows] = {};
  float total[kRows] = {}, largest[kRows] = {};
  const auto find_inverse_roots = [&] {
    if constexpr (Pass::kMoments != MomentsOf::kNothing) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        moments[i].inverse_root = rsqrtf(__fdividef(total[i], params.length) + params.eps);
      }
    }
  };

  if constexpr (Pass::kMoments == MomentsOf::kRootMeanSquare && Pass::kScaling != Scaling::kNone) {
    if (computes) {
      // A row's inverse root changes its largest number as all others: one reduction is enough.
      const auto weigh = [&](int i, const typename Row::Vector& vector, const Columns& column,
                             float (&v)[kVec]) {
        vector.to_floats(v);
#pragma unroll
        for (int k = 0; k < kVec; ++k) total[i] = fmaf(v[k], v[k], total[i]);
        Pass::weigh(params, column, v);
#pragma unroll
        for (int k = 0; k < kVec; ++k) largest[i] = fmaxf(largest[i], fabsf(v[k]));
      };
      const auto put_weighed = [&](int i, uint32 vec_idx, float (&v)[kVec]) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) v[k] *= moments[i].inverse_root;
        put(i, vec_idx, v);
      };
      // Why not for long rows: there are no registers for it.
      constexpr bool kKeeps = kHoldsRow;
      float weighed[kRows][kHeld][kVec], values[kVec];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          if (has(i, j)) weigh(i, x[i][j], columns[j], weighed[i][j]);
        }
      }
      if constexpr (!kHoldsRow) {
        for (uint32 vec_idx = first_unheld; vec_idx < num_vecs; vec_idx += team.size) {
          weigh(0, rows[0].take(rows[0].fetch(vec_idx), vec_idx), Columns(params, vec_idx), values);
        }
      }
      team_reduce<kTeam>(total, largest, team);
      find_inverse_roots();
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        // Why fmaxf: infinity times 0 counts as nothing, as NaN does in the maximum.
        set_scale(i, fmaxf(largest[i] * moments[i].inverse_root, 0.0f));
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          if (!has(i, j)) continue;
          if (!kKeeps) {
            x[i][j].to_floats(weighed[i][j]);
            Pass::weigh(params, columns[j], weighed[i][j]);
          }
          put_weighed(i, team.rank + j * team.size, weighed[i][j]);
        }
      }
      if constexpr (!kHoldsRow) {
        for (uint32 vec_idx = first_unheld; vec_idx < num_vecs; vec_idx += team.size) {
          rows[0].reload(vec_idx).to_floats(values);
          Pass::weigh(params, Columns(params, vec_idx), values);
          put_weighed(0, vec_idx, values);
        }
      }
      return;
    }
  }

  if constexpr (Pass::kMoments == MomentsOf::kMeanAndVariance) {
    for_each_vector(Constant<true>{}, [&](int i, uint32, const Columns&, float (&v)[kVec]) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) total[i] += v[k];
    });
    team_reduce<Sum, 0, kTeam>(total, team);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      moments[i].mean = __fdividef(total[i], params.length);
      total[i] = 0.0f;
    }
  }
  if constexpr (Pass::kMoments != MomentsOf::kNothing) {
    constexpr bool kCentred = Pass::kMoments == MomentsOf::kMeanAndVariance;
    for_each_vector(Constant<!kCentred>{}, [&](int i, uint32, const Columns&, float (&v)[kVec]) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float value = kCentred ? v[k] - moments[i].mean : v[k];
        total[i] = fmaf(value, value, total[i]);
      }
    });
    team_reduce<Sum, 1, kTeam>(total, team);
    find_inverse_roots();
  }
  if constexpr (Pass::kMoments != MomentsOf::kRootMeanSquare) {
    if (computes) {
      for_each_vector(Constant<false>{},
                      [&](int i, uint32, const Columns& column, float (&v)[kVec]) {
                        Pass::transform(params, moments[i], column, v);
#pragma unroll
                        for (int k = 0; k < kVec; ++k) largest[i] = fmaxf(largest[i], fabsf(v[k]));
                      });
      team_reduce<Largest, 2, kTeam>(largest, team);
#pragma unroll
      for (int i = 0; i < kRows; ++i) set_scale(i, largest[i]);
    }
  }
  for_each_vector(Constant<false>{},
                  [&](int i, uint32 vec_idx, const Columns& column, float (&v)[kVec]) {
                    Pass::transform(params, moments[i], column, v);
                    put(i, vec_idx, v);
                  });
}

// Rows of lanes: kRows of kHeld vectors a thread.
template <class Pass, int kRows, int kHeld, class Params>
__device__ __forceinline__ void run_lanes(const Params& params) {
  const uint32 size = params.shape.threads_per_row;
  const uint32 log2_size = 31 - __clz(size);
  const uint32 num_teams = blockDim.x >> log2_size;
  const uint32 team_idx = threadIdx.x >> log2_size;
  run_team<Pass, kRows, kHeld, TeamOf::kLanes>(
      params,
      {size, threadIdx.x & (size - 1), blockIdx.x * num_teams * kRows + team_idx, num_teams});
}

// kSlots: as row_plan() was told. kIsLong: only rows that take a block. Passes that only want a
// row's maximum follow maxima_plan().
template <class Pass, int kSlots = kRowSlots, bool kIsLong = false, class Params>
__device__ __forceinline__ void run_pass(const Params& params) {
  constexpr bool kIsMaximum = Pass::kMoments == MomentsOf::kNothing;
  pdl_wait();
  const RowShape& shape = params.shape;
  const uint32 size = shape.threads_per_row;
  if (size > kWarpSize && shape.num_vecs <= kSlots * size) {
    run_team<Pass, 1, kSlots, TeamOf::kBlock>(params, {size, threadIdx.x, blockIdx.x, 0});
    return;
  }
  if constexpr (kIsMaximum) {
    if (is_split(shape.num_vecs)) return run_lanes<Pass, 1, kRowSlots>(params);
  }
  if (!kIsLong && shape.num_vecs <= kWarpSize) return run_lanes<Pass, kRowSlots, 1>(params);
  const bool in_warp = !kIsLong && !kIsMaximum && size == kWarpSize;
  const uint32 row_idx = in_warp ? (blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize : blockIdx.x;
  // Whole warps only, and never in a block that synchronises.
  if (row_idx >= shape.num_rows) return;
  run_team<Pass, 1, kSlots, TeamOf::kWarpOrBlock>(
      params, {size, in_warp ? threadIdx.x % kWarpSize : threadIdx.x, row_idx, 0});
}

}  // namespace ridgeline
