#include "runtime/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace ridgeline {
namespace {

constexpr int kMinimumVersion = 12000;  // cuLibraryLoadData came with CUDA 12.0

using GetProcAddress = CUresult (*)(const char* symbol, void** function, int version,
                                    uint64_t flags, int* status);

Driver load() {
  const char* given = std::getenv("RIDGELINE_LIBCUDA");
  const char* file = given && *given ? given : "libcuda.so.1";
  void* handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    throw std::runtime_error(std::string("the NVIDIA driver library '") + file +
                             "' could not be loaded (" + dlerror() +
                             "). Install an NVIDIA driver (525 or newer), or move the tensors to "
                             "the CPU");
  }
  const auto symbol = [&](const char* name) { return dlsym(handle, name); };
  const auto get_version = reinterpret_cast<CUresult (*)(int*)>(symbol("cuDriverGetVersion"));
  const auto get_address = reinterpret_cast<GetProcAddress>(symbol("cuGetProcAddress_v2"));
  int version = 0;
  if (get_version) get_version(&version);
  if (version < kMinimumVersion || !get_address) {
    throw std::runtime_error("the NVIDIA driver supports CUDA " + std::to_string(version / 1000) +
                             "." + std::to_string(version % 1000 / 10) +
                             ", ridgeline needs 12.0 or newer. Update the driver to 525 or newer");
  }
  Driver table{};
  const auto bind = [&](auto& slot, const char* name) {
    void* address = nullptr;
    int status = 0;
    if (get_address(name, &address, kMinimumVersion, 0, &status) != kCudaSuccess || !address) {
      throw std::runtime_error(std::string("the NVIDIA driver has no function ") + name +
                               ". Update the driver to 525 or newer");
    }
    slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(address);
  };
  bind(table.init, "cuInit");
  bind(table.driver_get_version, "cuDriverGetVersion");
  bind(table.get_error_string, "cuGetErrorString");
  bind(table.device_get, "cuDeviceGet");
  bind(table.device_get_count, "cuDeviceGetCount");
  bind(table.device_get_name, "cuDeviceGetName");
  bind(table.device_get_attribute, "cuDeviceGetAttribute");
  bind(table.primary_ctx_retain, "cuDevicePrimaryCtxRetain");
  bind(table.ctx_get_device, "cuCtxGetDevice");
  bind(table.ctx_push_current, "cuCtxPushCurrent");
  bind(table.ctx_pop_current, "cuCtxPopCurrent");
  bind(table.pointer_get_attribute, "cuPointerGetAttribute");
  bind(table.mem_host_alloc, "cuMemHostAlloc");
  bind(table.stream_is_capturing, "cuStreamIsCapturing");
  bind(table.thread_exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  bind(table.library_load_data, "cuLibraryLoadData");
  bind(table.library_get_kernel, "cuLibraryGetKernel");
  bind(table.kernel_get_function, "cuKernelGetFunction");
  bind(table.kernel_set_attribute, "cuKernelSetAttribute");
  bind(table.occupancy_max_active_clusters, "cuOccupancyMaxActiveClusters");
  bind(table.launch_kernel_ex, "cuLaunchKernelEx");
  if (const CUresult error = table.init(0); error != kCudaSuccess) {
    const char* text = nullptr;
    table.get_error_string(error, &text);
    throw std::runtime_error(std::string("the NVIDIA driver does not start (") +
                             (text ? text : "unknown error") + "). `nvidia-smi` shows its state");
  }
  return table;
}

}  // namespace

const Driver& driver() {
  static const Driver table = load();
  return table;
}

std::string driver_error(CUresult error) {
  const char* text = nullptr;
  driver().get_error_string(error, &text);
  return (text ? text : "unknown error") + std::string(" (CUDA error ") + std::to_string(error) +
         ")";
}

void driver_check(CUresult error, const std::string& what) {
  if (error != kCudaSuccess) throw std::runtime_error(what + ": " + driver_error(error));
}

}  // namespace ridgeline
