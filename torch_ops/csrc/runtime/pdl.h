// The option `enable_pdl`: programmatic dependent launch.
#pragma once

#include "runtime/check.h"
#include "runtime/device.h"

namespace ridgeline {

// `enable_pdl` as given; fails on GPUs that do not have it.
inline bool checked_pdl(const char* op, const Device& gpu, bool enable_pdl) {
  if (enable_pdl && gpu.sm < 90) {
    fail(op, "enable_pdl", "False or None on GPUs before compute capability 9.0",
         "True on " + gpu.name + " (" + std::to_string(gpu.sm) + ")", "Leave it out");
  }
  return enable_pdl;
}

}  // namespace ridgeline
