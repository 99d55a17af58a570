// What the library knows of a GPU, and the scope in which its context is current.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
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
  int l2_bytes;
  CUdevice handle;
  CUcontext context;  // the primary context, which torch uses too
};

// Throws std::runtime_error when there is no such device or no driver. Lock-free after the first.
const Device& device(int index);

// The native architecture id of a compute capability: 90 -> "sm_90a", 80 -> "sm_80".
std::string native_arch(int sm);

// Makes a GPU current, as torch.cuda.device does, and what was current before it again. Costs one
// driver query when it is current already.
class DeviceScope {
 public:
  explicit DeviceScope(const Device& device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  bool pushed_ = false;
};

}  // namespace ridgeline
