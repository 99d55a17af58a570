// What the library knows of a GPU, and the scope in which its context is current.
#pragma once

#include <string>

#include "runtime/driver.h"

namespace ridgeline {

inline constexpr int kMaxDevices = 64;

struct Device {
  int index;
  std::string name;
  int real_sm;  // compute capability, 90 for 9.0
  int sm;       // the one whose code path runs: real_sm unless RIDGELINE_ARCH says otherwise
  std::string
      arch;  // what kernels are resolved for: "sm_90a", or "compute_80" under RIDGELINE_ARCH
  int num_sms;
  int max_dynamic_smem;  // bytes a block may opt in to
  CUdevice handle;
  CUcontext context;  // the primary context, which torch uses too
};

// Throws std::runtime_error when there is no such device or no driver. Lock-free after the first.
const Device& device(int index);

// The native architecture id of a compute capability: 90 -> "sm_90a", 80 -> "sm_80".
std::string native_arch(int sm);

// Makes the device's primary context current, and restores what was current before. Costs one
// driver query when it is current already.
class ContextScope {
 public:
  explicit ContextScope(const Device& device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace ridgeline
