#include "runtime/host_memory.h"

namespace ridgeline {

void* device_address(const Arg& arg, const Device& gpu) {
  const Tensor& tensor = arg.tensor;
  void* address = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.is_cuda() && tensor.get_device_index() == gpu.index) return address;
  if (tensor.is_cpu() && tensor.numel() == 0) return address;
  if (tensor.is_cpu()) {
    const DeviceScope context(gpu);
    void* mapped = nullptr;
    const CUresult error = driver().pointer_get_attribute(&mapped, PointerAttribute::kDevicePointer,
                                                          reinterpret_cast<uintptr_t>(address));
    if (error == kCudaSuccess) return mapped;
  }
  const std::string where = "cuda:" + std::to_string(gpu.index);
  fail(arg.op, arg.name, "a tensor on " + where + " or in pinned host memory",
       tensor.is_cpu() ? "one in pageable host memory" : "one on " + device_name(tensor),
       "Make the host pool with pin_memory=True");
}

}  // namespace ridgeline
