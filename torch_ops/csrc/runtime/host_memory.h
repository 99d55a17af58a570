// Host memory that kernels may touch: pinned memory, which the driver maps for every GPU.
#pragma once

#include "runtime/check.h"
#include "runtime/device.h"

namespace ridgeline {

// Where the GPU finds a tensor that lies on it or in pinned host memory; fails, naming the
// argument, when it lies anywhere else.
void* device_address(const Arg& arg, const Device& gpu);

}  // namespace ridgeline
