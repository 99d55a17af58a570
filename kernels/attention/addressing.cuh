// Where the keys and values of a token lie. An addressing type names the element type of the cache
// and is made once for a work item. look_up<kRows, kLoaders>(first_token, end) reads what the
// addresses of a step of kRows rows depend on, which kLoaders threads copy, eight of them a row;
// turn_to() with the answer makes it the step that keys<kRows, kLoaders>(first_token, end, element)
// and values(...) are asked for. These answer with Rows: at(pass) is the address of `element`
// in the calling thread's row of a pass, first_token + thread / 8 + pass * kLoaders / 8. Nothing is
// read of tokens from `end` on; where kHasAllRows, the last token stands in for them.
//
// WithPlaces is the addressing of tiles that have a step's answer well before they ask for its rows
// (kCountsArrivals). kCopiesAt: beside which read of values these copies start, by what was
// fastest: an early one leaves fewer registers, a late one less time (kCopiesAtOfNarrow: with heads
// of 64; kCopiesAtOfFull: with others where all exponentials are taken before; kCopiesAtOfCapped:
// in the steps of tile_capped.cuh).
#pragma once

#include "attention/batch_params.h"
#include "attention/params.h"
#include "attention/work_item.cuh"
#include "common/cp_async.cuh"
#include "common/ldmatrix.cuh"
#include "common/opaque.cuh"

namespace ridgeline {

// The calling thread's row in the first pass of kLoaders threads.
template <int kLoaders>
__device__ __forceinline__ uint32 lane_row() {
  return threadIdx.x % kLoaders / 8;
}

// Rows at one stride.
template <typename T>
struct StridedRows {
  static constexpr bool kHasAllRows = false;
  uint64 address;  // of the calling thread's first row
  uint64 step;     // bytes from a pass to the next

  __device__ __forceinline__ StridedRows(uint64 base, int64 stride, uint32 row, uint32 element,
                                         int rows_per_pass)
      : address(base + element * uint32(sizeof(T)) + row * uint64(stride * int(sizeof(T)))),
        step(uint64(stride) * (rows_per_pass * int(sizeof(T)))) {}

  __device__ __forceinline__ const T* at(int pass) const {
    return reinterpret_cast<const T*>(address + pass * step);
  }
};

// One stride from token to token: dense caches, NHD and HND alike. Why opaque: no register of the
// loop for what a product makes.
template <typename T>
struct StridedKv {
  using WithPlaces = StridedKv;
  using Element = T;
  using Rows = StridedRows<T>;
  static constexpr int kCopiesAt = 10;
  static constexpr int kCopiesAtOfNarrow = 10;
  static constexpr int kCopiesAtOfFull = 0;
  static constexpr int kCopiesAtOfCapped = 10;

  const AttentionParams& params;
  int kv_head;

  __device__ __forceinline__ StridedKv(const AttentionParams& params, const WorkItem& work)
      : params(params), kv_head(work.kv_head) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int /*first_token*/, int /*end*/) const {
    return 0;
  }
  __device__ __forceinline__ void turn_to(uint32 /*answer*/) {}

  template <int /*kRows*/, int kLoaders>
  __device__ __forceinline__ StridedRows<T> keys(int first_token, int /*end*/,
                                                 uint32 element) const {
    return {reinterpret_cast<uint64>(params.k) + head_offset(params.k_stride_head),
            params.k_stride_token, uint32(first_token) + lane_row<kLoaders>(), element,
            kLoaders / 8};
  }
  template <int /*kRows*/, int kLoaders>
  __device__ __forceinline__ StridedRows<T> values(int first_token, int /*end*/,
                                                   uint32 element) const {
    return {reinterpret_cast<uint64>(params.v) + head_offset(params.v_stride_head),
            params.v_stride_token, uint32(first_token) + lane_row<kLoaders>(), element,
            kLoaders / 8};
  }

 private:
  __device__ __forceinline__ uint64 head_offset(int64 stride) const {
    return uint32(opaque(kv_head)) * uint64(stride * int(sizeof(T)));
  }
};

// Requests of a batch one behind the other (ragged), or at one stride from each other (padded).
template <typename T>
struct RaggedKv {
  using WithPlaces = RaggedKv;
  using Element = T;
  using Rows = StridedRows<T>;
  static constexpr int kCopiesAt = 9;
  static constexpr int kCopiesAtOfNarrow = 0;
  static constexpr int kCopiesAtOfFull = 9;
  static constexpr int kCopiesAtOfCapped = 9;

  const BatchAttentionParams& params;
  const BatchItem& item;

  __device__ __forceinline__ RaggedKv(const BatchAttentionParams& params, const BatchItem& item)
      : params(params), item(item) {}

  static __device__ __forceinline__ void fetch_first(const BatchAttentionParams& /*params*/) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int /*first_token*/, int /*end*/) const {
    return 0;
  }
  __device__ __forceinline__ void turn_to(uint32 /*answer*/) {}

  template <int /*kRows*/, int kLoaders>
  __device__ __forceinline__ StridedRows<T> keys(int first_token, int /*end*/,
                                                 uint32 element) const {
    return {item.key_address, params.attention.k_stride_token,
            uint32(first_token) + lane_row<kLoaders>(), element, kLoaders / 8};
  }
  template <int /*kRows*/, int kLoaders>
  __device__ __forceinline__ StridedRows<T> values(int first_token, int /*end*/,
                                                   uint32 element) const {
    return {item.value_address, params.attention.v_stride_token,
            uint32(first_token) + lane_row<kLoaders>(), element, kLoaders / 8};
  }
};

// Rows whose places in the pool the lanes of a warp know. Eight lanes load a row of a pass
// together; the p-th of them knows the place of their row in pass p.
template <typename T>
struct PooledRows {
  static constexpr bool kHasAllRows = false;
  uint64 base;
  uint32 place;  // units from the pool's begin to this lane's row
  uint32 unit;   // bytes

  __device__ __forceinline__ const T* at(int pass) const {
    return reinterpret_cast<const T*>(base +
                                      uint64(__shfl_sync(0xffffffffu, place, pass, 8)) * unit);
  }
};

template <typename T>
struct PlacedKv;

// The token of this lane's row of a step, whose rows kLoaders threads load: those of a pass lie
// eight lanes apart, those of a lane's passes in its eight lanes. Nothing is read of tokens from
// `end` on.
template <int kRows, int kLoaders>
__device__ __forceinline__ uint32 own_token(int first_token, int end) {
  constexpr uint32 kRowsPerPass = kLoaders / 8;
  static_assert(kRows <= kLoaders, "a warp has a lane for each of its rows");
  const uint32 loader = threadIdx.x % kLoaders;
  const uint32 row = loader % (kRows / kRowsPerPass) * kRowsPerPass + loader / 8;
  return min(first_token + int(row), end - 1);
}

// Pages of page_size tokens, in the order of a table. A warp loads four rows of a pass and at most
// 32 of a step: each lane looks up the page of one of them, and tells the others the place.
template <typename T>
struct PagedKv {
  using WithPlaces = PlacedKv<T>;
  using Element = T;
  using Rows = PooledRows<T>;

  const BatchAttentionParams& params;
  const BatchItem& item;
  uint32 page;  // of this lane's row

  __device__ __forceinline__ PagedKv(const BatchAttentionParams& params, const BatchItem& item)
      : params(params), item(item), page(0) {}

  // Brings page numbers into the first cache before the calling CTA knows its work: those that it
  // begins with if requests share the table about as they share the CTAs' work. By all warps but
  // the first, which reads the work list meanwhile.
  static __device__ __forceinline__ void fetch_first(const BatchAttentionParams& params) {
    constexpr int kTokens = 768, kTokensBefore = 256, kEntriesOfSector = 8;
    constexpr int kMostEntries = 1 << 16;  // in a larger table nothing is gained
    __shared__ int words[128];
    const int team = params.team_size.quotient(blockIdx.x);
    const int place = int(float(team) * params.entries_of_team);
    const int before = params.page_size.quotient(kTokensBefore) + kEntriesOfSector;
    const int count = params.page_size.quotient(kTokens) + 2 * kEntriesOfSector;
    const int first = (int(threadIdx.x) - 32) * kEntriesOfSector;
    const int entry = max(0, place - before) + first;
    if (first >= 0 && first < count && entry < params.num_indices &&
        params.num_indices <= kMostEntries) {
      cp_async_cached(shared_address(words + threadIdx.x % 128), params.kv_indices + entry);
    }
  }

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int first_token, int end) const {
    const uint32 token = own_token<kRows, kLoaders>(first_token, end);
    return __ldg(reinterpret_cast<const uint32*>(item.table_address) +
                 params.page_size.quotient(token));
  }
  __device__ __forceinline__ void turn_to(uint32 answer) { page = answer; }

  template <int kRows, int kLoaders>
  __device__ __forceinline__ Rows keys(int first_token, int end, uint32 element) const {
    return {item.key_address + element * uint32(sizeof(T)),
            place(own_token<kRows, kLoaders>(first_token, end), params.k_page_units,
                  params.k_token_units),
            params.k_unit * uint32(sizeof(T))};
  }
  template <int kRows, int kLoaders>
  __device__ __forceinline__ Rows values(int first_token, int end, uint32 element) const {
    return {item.value_address + element * uint32(sizeof(T)),
            place(own_token<kRows, kLoaders>(first_token, end), params.v_page_units,
                  params.v_token_units),
            params.v_unit * uint32(sizeof(T))};
  }

 private:
  // A page number beyond the pool means the last page.
  __device__ __forceinline__ uint32 place(uint32 token, uint32 page_units,
                                          uint32 token_units) const {
    const uint32 entry = params.page_size.remainder(token);
    return min(page, uint32(params.num_pages - 1)) * page_units + entry * token_units;
  }
};

// Rows whose places in the pool lie in shared memory.
template <typename T>
struct PlacedRows {
  static constexpr bool kHasAllRows = true;
  uint64 base;
  uint4 places;  // of the passes, in units from the pool's begin
  uint32 unit;   // bytes

  __device__ __forceinline__ const T* at(int pass) const {
    const uint32 of_pass[4] = {places.x, places.y, places.z, places.w};
    return reinterpret_cast<const T*>(base + uint64(of_pass[pass]) * unit);
  }
};

// PagedKv for steps of four passes. Each lane finds the place of one row, of its key if it is one
// of the first four of its eight lanes, else of its value, and leaves it in shared memory, first
// the token's place in its page, then the page's too: what is made beside products with keys holds
// no register among those with values.
template <typename T>
struct PlacedKv {
  using Element = T;
  using Rows = PlacedRows<T>;
  static constexpr int kCopiesAt = 2;
  static constexpr int kCopiesAtOfNarrow = 0;
  static constexpr int kCopiesAtOfFull = 0;
  static constexpr int kCopiesAtOfCapped = 0;

  const BatchAttentionParams& params;
  const BatchItem& item;

  __device__ __forceinline__ PlacedKv(const BatchAttentionParams& params, const BatchItem& item)
      : params(params), item(item) {}

  template <int kRows, int kLoaders>
  __device__ __forceinline__ uint32 look_up(int first_token, int end) const {
    static_assert(kRows * 2 == kLoaders && kLoaders <= kMaxLoaders, "four passes, eight places");
    const uint32 token = own_token<kRows, kLoaders>(first_token, end);
    const uint32 index = params.page_size.quotient(token);
    const uint32 entry = token - index * params.page_size.divisor;
    own_place() = entry * (is_of_value() ? params.v_token_units : params.k_token_units);
    // Why opaque: the compiler would make the address from 64 bits.
    return __ldg(reinterpret_cast<const uint32*>(item.table_address) + uint32(opaque(int(index))));
  }
  // A page number beyond the pool means the last page.
  __device__ __forceinline__ void turn_to(uint32 answer) {
    const uint32 page = min(answer, uint32(params.num_pages - 1));
    own_place() += page * (is_of_value() ? params.v_page_units : params.k_page_units);
    __syncwarp();
  }

  template <int kRows, int kLoaders>
  __device__ __forceinline__ Rows keys(int /*first_token*/, int /*end*/, uint32 element) const {
    return {item.key_address + element * uint32(sizeof(T)), places_of_passes(0),
            params.k_unit * uint32(sizeof(T))};
  }
  template <int kRows, int kLoaders>
  __device__ __forceinline__ Rows values(int /*first_token*/, int /*end*/, uint32 element) const {
    return {item.value_address + element * uint32(sizeof(T)), places_of_passes(4),
            params.v_unit * uint32(sizeof(T))};
  }

 private:
  static constexpr int kMaxLoaders = 128;

  static __device__ __forceinline__ uint32* places() {
    __shared__ __align__(16) uint32 places[kMaxLoaders];
    return places;
  }
  // Why opaque: what a thread always finds would hold registers of the loop.
  static __device__ __forceinline__ uint32& own_place() {
    return places()[opaque(int(threadIdx.x))];
  }
  static __device__ __forceinline__ bool is_of_value() { return opaque(int(threadIdx.x)) & 4; }
  static __device__ __forceinline__ uint4 places_of_passes(int first) {
    return *reinterpret_cast<const uint4*>(places() + threadIdx.x / 8 * 8 + first);
  }
};

}  // namespace ridgeline
