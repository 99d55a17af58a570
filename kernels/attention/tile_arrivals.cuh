// What the warps of a tile wait for in the main loop, sm_90 on, with no barrier of the CTA: the
// copies of a step's keys and values by all threads, and all warps' reads of them. A warp then
// waits for another only where it would overwrite what that one has still to read, or read what
// that one has still to copy.
#pragma once

#include "common/arrival.cuh"

namespace ridgeline {

// A step is a round of both counts. Why the first round of a tile is kept: a count that had been
// brought back to an even round by more arrivals would have warps that are still waiting for the
// round before miss it.
struct TileArrivals {
  ArrivalCount there, read;
  int first_round;  // of the next tile, 0 or 1: only the lowest bit of a round counts

  __device__ __forceinline__ void init(int num_threads) {
    there.init(num_threads);
    read.init(num_threads / 32);
    first_round = 0;
  }
};

__device__ __forceinline__ TileArrivals& tile_arrivals() {
  __shared__ TileArrivals arrivals;
  return arrivals;
}

}  // namespace ridgeline
