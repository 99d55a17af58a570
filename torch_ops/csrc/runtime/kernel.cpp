#include "runtime/kernel.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "runtime/resolver.h"

// Weak: only CUDA builds of torch define it, and this library loads beside CPU builds too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace ridgeline {
namespace {

// What a launch gets without asking: 48 KiB, less room for what a kernel declares itself.
constexpr unsigned kDefaultDynamicSmem = 40 * 1024;

void allow_smem(Kernel& kernel, LoadedKernel& loaded, const Device& device, unsigned bytes) {
  if (bytes <= loaded.dynamic_smem.load(std::memory_order_relaxed)) return;
  driver_check(driver().kernel_set_attribute(FunctionAttribute::kMaxDynamicSharedMemory,
                                             static_cast<int>(bytes), loaded.handle, device.handle),
               "asking for " + std::to_string(bytes) + " bytes of shared memory for kernel " +
                   kernel.name());
  loaded.dynamic_smem.store(bytes, std::memory_order_relaxed);
}

// A launch as the driver takes it.
struct Config {
  std::array<LaunchAttribute, 2> attributes{};
  LaunchConfig config;

  Config(const Launch& how, CUstream stream)
      : config{how.grid_x, how.grid_y,       how.grid_z, how.block,         1,
               1,          how.dynamic_smem, stream,     attributes.data(), 0} {
    if (how.cluster > 0) {
      LaunchAttribute& attribute = attributes[config.num_attributes++];
      attribute.id = LaunchAttributeId::kClusterDimension;
      attribute.value.cluster = {how.cluster, 1, 1};
    }
    if (how.pdl) {
      LaunchAttribute& attribute = attributes[config.num_attributes++];
      attribute.id = LaunchAttributeId::kProgrammaticSerialization;
      attribute.value.programmatic_serialization = 1;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;
};

}  // namespace

const Kernel::Module& Kernel::module(const Device& device) {
  auto it = modules_.find(device.arch);
  if (it == modules_.end()) {
    const Entry entry = resolve(name_, device.arch);
    Module module{nullptr, entry.lowered};
    driver_check(driver().library_load_data(&module.library, entry.code.c_str(), nullptr, nullptr,
                                            0, nullptr, nullptr, 0),
                 "loading kernel " + name_ + " (" + entry.arch + ") on " + device.name);
    it = modules_.emplace(device.arch, std::move(module)).first;
  }
  return it->second;
}

LoadedKernel& Kernel::load(const Device& device) {
  const std::lock_guard lock(mutex_);
  if (LoadedKernel* found = loaded_[device.index].load()) return *found;
  const DeviceScope current(device);
  const RelaxedCapture relaxed;
  const Module& from = module(device);
  auto loaded = std::make_unique<LoadedKernel>();
  driver_check(driver().library_get_kernel(&loaded->handle, from.library, from.lowered.c_str()),
               "finding kernel " + name_ + " in its module");
  // Why: the function is what loads the code; under lazy loading a launch would, too late for a
  // stream that is being captured.
  driver_check(driver().kernel_get_function(&loaded->function, loaded->handle),
               "loading kernel " + name_ + " on " + device.name);
  loaded->dynamic_smem = kDefaultDynamicSmem;
  loaded_[device.index].store(loaded.get(), std::memory_order_release);
  return *loaded.release();
}

Kernel& kernel(const std::string& name) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Kernel>> kernels;
  const std::lock_guard lock(mutex);
  auto& slot = kernels[name];
  if (!slot) slot = std::make_unique<Kernel>(name);
  return *slot;
}

void launch(Kernel& kernel, const Device& device, const Launch& how, const void* params) {
  if (how.grid_x == 0 || how.grid_y == 0 || how.grid_z == 0) return;
  LoadedKernel& loaded = kernel.on(device);
  const DeviceScope current(device);
  allow_smem(kernel, loaded, device, how.dynamic_smem);
  const Config launched(how, current_stream(device));
  void* arguments[] = {const_cast<void*>(params)};
  const CUresult error =
      driver().launch_kernel_ex(&launched.config, loaded.function, arguments, nullptr);
  if (error != kCudaSuccess) {
    throw std::runtime_error("launching kernel " + kernel.name() + ": " + driver_error(error));
  }
}

unsigned resident_clusters(Kernel& kernel, const Device& device, const Launch& how) {
  LoadedKernel& loaded = kernel.on(device);
  auto& known = loaded.resident_clusters[std::bit_width(how.cluster) - 1];
  unsigned count = known.load(std::memory_order_relaxed);
  if (count > 0) return count;
  const DeviceScope current(device);
  allow_smem(kernel, loaded, device, how.dynamic_smem);
  Launch one = how;
  one.grid_x = how.cluster;
  const Config asked(one, nullptr);
  int found = 0;
  driver_check(driver().occupancy_max_active_clusters(&found, loaded.function, &asked.config),
               "asking how many clusters of kernel " + kernel.name() + " fit " + device.name);
  count = static_cast<unsigned>(std::max(found, 1));
  known.store(count, std::memory_order_relaxed);
  return count;
}

CUstream current_stream(const Device& device) {
  if (!aoti_torch_get_current_cuda_stream) {
    throw std::runtime_error(
        "this build of torch has no CUDA. Install a CUDA build of torch, or use CPU tensors");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device.index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch gave no current stream for GPU " +
                             std::to_string(device.index));
  }
  return static_cast<CUstream>(stream);
}

bool is_captured(CUstream stream) {
  if (stream == nullptr) return false;  // no capture takes the default stream
  CaptureStatus status = CaptureStatus::kNone;
  driver_check(driver().stream_is_capturing(stream, &status), "asking for the state of a stream");
  return status != CaptureStatus::kNone;
}

}  // namespace ridgeline
