#include "runtime/device.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace ridgeline {
namespace {

// RIDGELINE_ARCH as a compute capability: "90a" -> 90; 0 when it is not set.
int forced_sm() {
  const char* value = std::getenv("RIDGELINE_ARCH");
  if (!value || !*value) return 0;
  char* end = nullptr;
  const long sm = std::strtol(value, &end, 10);
  const std::string suffix = end;
  if (sm < 75 || sm > 999 || (!suffix.empty() && suffix != "a")) {
    throw std::runtime_error(std::string("RIDGELINE_ARCH: expected a compute capability such as "
                                         "75, 80, 89 or 90a, got '") +
                             value + "'");
  }
  return static_cast<int>(sm);
}

int attribute(DeviceAttribute id, CUdevice handle) {
  int value = 0;
  driver_check(driver().device_get_attribute(&value, id, handle), "reading a device attribute");
  return value;
}

std::unique_ptr<const Device> describe(int index) {
  const Driver& cuda = driver();
  auto info = std::make_unique<Device>();
  info->index = index;
  driver_check(cuda.device_get(&info->handle, index), "opening GPU " + std::to_string(index));
  std::array<char, 256> name{};
  driver_check(cuda.device_get_name(name.data(), name.size(), info->handle), "naming a GPU");
  info->name = name.data();
  info->real_sm = 10 * attribute(DeviceAttribute::kComputeCapabilityMajor, info->handle) +
                  attribute(DeviceAttribute::kComputeCapabilityMinor, info->handle);
  info->num_sms = attribute(DeviceAttribute::kMultiprocessorCount, info->handle);
  info->l2_bytes = attribute(DeviceAttribute::kL2CacheSize, info->handle);
  info->max_dynamic_smem = attribute(DeviceAttribute::kSharedMemoryPerBlockOptin, info->handle);
  const int forced = forced_sm();
  if (forced > info->real_sm) {
    throw std::runtime_error("RIDGELINE_ARCH=" + std::to_string(forced) + " is newer than " +
                             info->name + " (" + std::to_string(info->real_sm) +
                             "): only the same or older code paths run on it");
  }
  info->sm = forced != 0 ? forced : info->real_sm;
  info->arch =
      info->sm == info->real_sm ? native_arch(info->sm) : "compute_" + std::to_string(info->sm);
  driver_check(cuda.primary_ctx_retain(&info->context, info->handle),
               "retaining the primary context of GPU " + std::to_string(index));
  return info;
}

}  // namespace

std::string native_arch(int sm) {
  // Why 90 alone: wgmma and setmaxnreg are in the architecture-specific set of Hopper.
  return "sm_" + std::to_string(sm) + (sm == 90 ? "a" : "");
}

const Device& device(int index) {
  static std::array<std::atomic<const Device*>, kMaxDevices> known{};
  static std::mutex mutex;
  if (index < 0 || index >= kMaxDevices) {
    throw std::runtime_error("GPU index " + std::to_string(index) + " is out of range (0 to " +
                             std::to_string(kMaxDevices - 1) + ")");
  }
  if (const Device* found = known[index].load(std::memory_order_acquire)) return *found;
  const std::lock_guard lock(mutex);
  if (!known[index].load()) known[index].store(describe(index).release());
  return *known[index].load();
}

DeviceScope::DeviceScope(const Device& device) {
  CUdevice current = -1;
  const auto is_current = [&] {
    return driver().ctx_get_device(&current) == kCudaSuccess && current == device.handle;
  };
  if (is_current()) return;
  guard_.emplace(device.index);
  if (is_current()) return;
  // A thread that has used no GPU yet: torch takes its device for current without a context.
  driver_check(driver().ctx_push_current(device.context),
               "making GPU " + std::to_string(device.index) + " current");
  pushed_ = true;
}

DeviceScope::~DeviceScope() {
  CUcontext context;
  if (pushed_) driver().ctx_pop_current(&context);
}

}  // namespace ridgeline
