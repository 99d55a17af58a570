// Kernels by name, and the one way to launch them.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <string>

#include "runtime/device.h"

namespace ridgeline {

// A kernel on one GPU.
struct LoadedKernel {
  CUfunction function;
  CUkernel handle;
  std::atomic<unsigned> dynamic_smem;  // bytes that launches may ask for so far
  // Clusters of 2^i blocks that fit the GPU at once; 0: not asked yet.
  std::array<std::atomic<unsigned>, 4> resident_clusters;
};

// A kernel name and what it is on each GPU, loaded on first use. Lock-free after that.
class Kernel {
 public:
  explicit Kernel(std::string name) : name_(std::move(name)) {}

  const std::string& name() const { return name_; }

  LoadedKernel& on(const Device& device) {
    LoadedKernel* found = loaded_[device.index].load(std::memory_order_acquire);
    return found ? *found : load(device);
  }

 private:
  struct Module {
    CUlibrary library;
    std::string lowered;
  };

  LoadedKernel& load(const Device& device);
  const Module& module(const Device& device);

  const std::string name_;
  std::mutex mutex_;
  std::map<std::string, Module> modules_;  // by architecture
  std::array<std::atomic<LoadedKernel*>, kMaxDevices> loaded_{};
};

// The process-wide object of a name. Takes a lock: ops keep the reference.
Kernel& kernel(const std::string& name);

struct Launch {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned block = 1;
  unsigned dynamic_smem = 0;
  unsigned cluster = 0;  // blocks of a cluster; 0: the kernel asks nothing of clusters
  bool pdl = false;      // programmatic dependent launch behind the previous kernel of the stream
};

// Launches on torch's current stream of the device, with its context current. `params` points to
// the kernel's one parameter. An empty grid launches nothing.
void launch(Kernel& kernel, const Device& device, const Launch& how, const void* params);

// How many clusters (of 1, 2, 4 or 8 blocks) of such a launch the GPU holds at once, whatever its
// grid; at least 1. Asked of the driver once for each size, so a kernel's launches that ask this
// must have one block size and one amount of shared memory.
unsigned resident_clusters(Kernel& kernel, const Device& device, const Launch& how);

// Torch's current stream of the device.
CUstream current_stream(const Device& device);

// Whether a CUDA graph takes in what is launched on a stream.
bool is_captured(CUstream stream);

}  // namespace ridgeline
