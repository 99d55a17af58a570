// Radix selection by a block of kRowThreads threads, without sorting: the threshold of the first
// composites, in falling order, that number `wanted` or weigh `wanted`.
//
// One pass a digit: a histogram of the elements that share the digits found so far, then the bin in
// which the running sum reaches what is wanted. Sums are integers, so the atomics' order does not
// matter. A source calls visit(composite, x) for its elements, spread over the threads. A threshold
// parts the source's elements only: it may lie anywhere above the next one below it.
#pragma once

#include "sampling/block.cuh"
#include "sampling/order.cuh"

namespace ridgeline {

constexpr int kDigitBits = 11;
constexpr uint32 kMaxBins = 1u << kDigitBits;

struct SelectScratch {
  BlockScratch block;
  uint32 counts[kMaxBins];
  uint32 low[kMaxBins];
  uint32 high[kMaxBins];
  uint32 bin;
  uint32 bin_count;
  uint64 rest;
};

// A 64-bit sum of two native 32-bit atomics.
__device__ __forceinline__ void add_mass(SelectScratch& scratch, uint32 bin, uint64 mass) {
  const uint32 low = static_cast<uint32>(mass);
  const uint32 before = atomicAdd(&scratch.low[bin], low);
  const uint32 carry = before + low < before ? 1 : 0;
  const uint32 high = static_cast<uint32>(mass >> 32) + carry;
  if (high > 0) atomicAdd(&scratch.high[bin], high);
}

// The bin, from the last one down, in which the running sum reaches `wanted`, and what is wanted of
// that bin alone. False when all bins together do not reach it.
template <bool kByMass>
__device__ __forceinline__ bool find_bin(SelectScratch& scratch, uint32 num_bins, uint64 wanted) {
  const uint32 share = num_bins < kRowThreads ? 1 : num_bins / kRowThreads;
  const uint32 first = threadIdx.x * share;  // counted from the last bin
  const auto sum_of = [&](uint32 i) -> uint64 {
    const uint32 bin = num_bins - 1 - i;
    if (!kByMass) return scratch.counts[bin];
    return static_cast<uint64>(scratch.high[bin]) << 32 | scratch.low[bin];
  };
  uint64 mine = 0;
  if (first < num_bins) {
    for (uint32 i = 0; i < share; ++i) mine += sum_of(first + i);
  }
  uint64 before = sum_before(mine, scratch.block);
  const bool found = before < wanted && wanted <= before + mine;
  if (found) {
    uint32 i = first;
    while (before + sum_of(i) < wanted) before += sum_of(i++);
    scratch.bin = num_bins - 1 - i;
    scratch.bin_count = scratch.counts[scratch.bin];
    scratch.rest = wanted - before;
  }
  return __syncthreads_or(found);
}

// The elements looked at are those of composites in [floor, top]; only their `bits` lowest bits
// matter, if that is less than what floor and top share. kExact: to the last bit, even when fewer
// digits already tell the elements apart.
struct Range {
  uint64 floor;
  uint64 top;
};

template <bool kByMass, bool kExact = false, class Source, class Weigher>
__device__ __forceinline__ bool select(const Source& source, const Weigher& weigher, Range range,
                                       uint64 mask, uint64 wanted, SelectScratch& scratch,
                                       uint64& threshold) {
  const uint64 top = range.top & mask;
  const uint64 differing = kExact ? mask : (range.floor & mask) ^ top;
  int shift = 64 - __clzll(static_cast<int64>(differing));
  uint64 base = differing == 0 ? top : top >> shift << shift;
  if (kExact) base = 0;
  while (shift > 0) {
    const int width = shift < kDigitBits ? shift : kDigitBits;
    const int known = shift;
    shift -= width;
    const uint32 num_bins = 1u << width;
    for (uint32 i = threadIdx.x; i < num_bins; i += kRowThreads) {
      scratch.counts[i] = 0;
      if (kByMass) scratch.low[i] = scratch.high[i] = 0;
    }
    __syncthreads();
    source.for_each([&](uint64 composite, float x) {
      const uint64 code = composite & mask;
      if (composite < range.floor || code >> known != base >> known) return;
      const uint32 bin = static_cast<uint32>(code >> shift) & (num_bins - 1);
      atomicAdd(&scratch.counts[bin], 1u);
      if (kByMass) add_mass(scratch, bin, mass_of(weigher.weight(x)));
    });
    __syncthreads();
    if (!find_bin<kByMass>(scratch, num_bins, wanted)) return false;
    base |= static_cast<uint64>(scratch.bin) << shift;
    wanted = scratch.rest;
    const bool settled = !kExact && scratch.bin_count == (kByMass ? 1 : wanted);
    __syncthreads();
    if (settled) break;
  }
  // The last bin may reach below the range.
  threshold = !kExact && base < range.floor ? range.floor : base;
  return true;
}

// The mass of the elements from `floor` on.
template <class Source, class Weigher>
__device__ __forceinline__ uint64 mass_from(const Source& source, const Weigher& weigher,
                                            uint64 floor, SelectScratch& scratch) {
  uint64 mass = 0;
  source.for_each([&](uint64 composite, float x) {
    if (composite >= floor) mass += mass_of(weigher.weight(x));
  });
  return block_total(mass, scratch.block);
}

// The element, in the order of the indices, at which the running mass of those from `floor` on
// passes `target`.
template <class Source, class Weigher>
__device__ __forceinline__ uint32 index_at(const Source& source, const Weigher& weigher,
                                           const Order& order, uint64 floor, uint64 target,
                                           SelectScratch& scratch) {
  uint64 code = order.index_mask();
  select<true, true>(source, weigher, {floor, ~uint64{0}}, order.index_mask(), target + 1, scratch,
                     code);
  return order.index(code);
}

}  // namespace ridgeline
