// The CUDA driver API, found at run time in libcuda.so.1. The table holds what this library calls
// and no more: no synchronous copy, no synchronize.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ridgeline {

using CUdevice = int;
using CUresult = int;
using CUcontext = struct CUctx_st*;
using CUfunction = struct CUfunc_st*;
using CUkernel = struct CUkern_st*;
using CUlibrary = struct CUlib_st*;
using CUstream = struct CUstream_st*;

inline constexpr CUresult kCudaSuccess = 0;

// Layouts of cuda.h, which the build does not need.
enum class LaunchAttributeId : int { kClusterDimension = 4, kProgrammaticSerialization = 6 };
struct LaunchAttribute {
  LaunchAttributeId id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int programmatic_serialization;
  } value;
};
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned dynamic_smem;
  CUstream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

enum class DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kL2CacheSize = 38,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kSharedMemoryPerBlockOptin = 97,
};
enum class FunctionAttribute : int { kMaxDynamicSharedMemory = 8 };
enum class PointerAttribute : int { kDevicePointer = 3 };
enum class CaptureStatus : int { kNone = 0, kActive = 1, kInvalidated = 2 };
enum class CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };

struct Driver {
  CUresult (*init)(unsigned flags);
  CUresult (*driver_get_version)(int* version);
  CUresult (*get_error_string)(CUresult error, const char** text);
  CUresult (*device_get)(CUdevice* device, int ordinal);
  CUresult (*device_get_count)(int* count);
  CUresult (*device_get_name)(char* name, int size, CUdevice device);
  CUresult (*device_get_attribute)(int* value, DeviceAttribute attribute, CUdevice device);
  CUresult (*primary_ctx_retain)(CUcontext* context, CUdevice device);
  CUresult (*ctx_get_device)(CUdevice* device);
  CUresult (*ctx_push_current)(CUcontext context);
  CUresult (*ctx_pop_current)(CUcontext* context);
  CUresult (*pointer_get_attribute)(void* value, PointerAttribute attribute, uint64_t address);
  CUresult (*mem_host_alloc)(void** address, size_t num_bytes, unsigned flags);
  CUresult (*stream_is_capturing)(CUstream stream, CaptureStatus* status);
  CUresult (*thread_exchange_capture_mode)(CaptureMode* mode);
  CUresult (*library_load_data)(CUlibrary* library, const void* code, int* jit_options,
                                void** jit_values, unsigned num_jit_options, int* library_options,
                                void** library_values, unsigned num_library_options);
  CUresult (*library_get_kernel)(CUkernel* kernel, CUlibrary library, const char* name);
  CUresult (*kernel_get_function)(CUfunction* function, CUkernel kernel);
  CUresult (*kernel_set_attribute)(FunctionAttribute attribute, int value, CUkernel kernel,
                                   CUdevice device);
  CUresult (*occupancy_max_active_clusters)(int* num_clusters, CUfunction function,
                                            const LaunchConfig* config);
  CUresult (*launch_kernel_ex)(const LaunchConfig* config, CUfunction function, void** params,
                               void** extra);
};

// Loads libcuda (RIDGELINE_LIBCUDA names another file) and initialises it, once.
// Throws std::runtime_error when there is no driver or it is older than CUDA 12.
const Driver& driver();

std::string driver_error(CUresult error);

// Throws std::runtime_error "<what>: <driver's own text>" unless the call succeeded.
void driver_check(CUresult error, const std::string& what);

// Lets this thread load modules and allocate while one of its streams is being captured.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().thread_exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { driver().thread_exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  CaptureMode mode_ = CaptureMode::kRelaxed;
};

}  // namespace ridgeline
