#include "runtime/workspace.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <thread>

#include "runtime/alloc.h"
#include "runtime/kernel.h"

// Weak: only CUDA builds of torch define them, and this library loads beside CPU builds too.
extern "C" {
AOTITorchError aoti_torch_create_cuda_stream_guard(void* stream, int32_t device_index, void** guard)
    __attribute__((weak));
AOTITorchError aoti_torch_delete_cuda_stream_guard(void* guard) __attribute__((weak));
}

namespace ridgeline {
namespace {

constexpr int64_t kSmallest = int64_t{1} << 20;  // bytes
constexpr int kFewestCounters = 4096;

struct StreamMemory {
  const CUstream stream;
  StreamMemory* const next;
  std::mutex mutex;
  std::optional<Tensor> bytes;
  int64_t num_bytes = 0;
  std::optional<Tensor> counters;
  int num_counters = 0;
};

// The memory of a stream, made on its first use. Never destroyed: when the process ends, torch may
// be gone first.
StreamMemory& memory_of(const Device& device, CUstream stream) {
  static std::array<std::atomic<StreamMemory*>, kMaxDevices> all{};
  static std::mutex making;
  const auto find = [&]() -> StreamMemory* {
    StreamMemory* found = all[device.index].load(std::memory_order_acquire);
    while (found && found->stream != stream) found = found->next;
    return found;
  };
  if (StreamMemory* found = find()) return *found;
  const std::lock_guard lock(making);
  if (StreamMemory* found = find()) return *found;
  auto* made = new StreamMemory{stream, all[device.index].load(), {}, {}, 0, {}, 0};
  all[device.index].store(made, std::memory_order_release);
  return *made;
}

// Why another thread: torch.compile's graph trees send what a thread allocates while they warm up
// to the pool of a graph, and refuse memory that stays there.
Tensor allocate(const Device& device, CUstream stream, int64_t num_bytes, bool cleared) {
  std::optional<Tensor> made;
  std::exception_ptr error;
  std::thread([&] {
    try {
      // Not a DeviceScope, which asks for a context that a new thread has not.
      driver_check(driver().ctx_push_current(device.context), "making a GPU current");
      void* guard = nullptr;
      if (aoti_torch_create_cuda_stream_guard(stream, device.index, &guard) != AOTI_TORCH_SUCCESS) {
        throw std::runtime_error("torch did not make a stream current");
      }
      try {
        made = empty(device.index, {num_bytes}, Dtype::Byte);
        if (cleared && aoti_torch_zero_(made->get()) != AOTI_TORCH_SUCCESS) {
          throw std::runtime_error("torch did not clear a tensor");
        }
      } catch (...) {
        error = std::current_exception();
      }
      aoti_torch_delete_cuda_stream_guard(guard);
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
  return *made;
}

}  // namespace

Workspace::Workspace(const Device& device, int64_t num_bytes, int num_counters) {
  const CUstream stream = current_stream(device);
  if (!aoti_torch_create_cuda_stream_guard || is_captured(stream)) {
    own_ = empty(device.index, {num_bytes}, Dtype::Byte);
    data_ = own_->mutable_data_ptr();
    return;
  }
  StreamMemory& memory = memory_of(device, stream);
  turn_ = std::unique_lock(memory.mutex);
  if (memory.num_bytes < num_bytes) {
    const int64_t wanted = std::max({kSmallest, num_bytes, 2 * memory.num_bytes});
    // The old memory first: torch may give it to this stream again.
    memory.num_bytes = 0;
    memory.bytes.reset();
    memory.bytes = allocate(device, stream, wanted, false);
    memory.num_bytes = wanted;
  }
  data_ = memory.bytes->mutable_data_ptr();
  if (num_counters == 0) return;
  if (memory.num_counters < num_counters) {
    const int wanted = std::max(kFewestCounters, num_counters);
    memory.num_counters = 0;
    memory.counters = allocate(device, stream, wanted * int64_t{sizeof(int)}, true);
    memory.num_counters = wanted;
  }
  counters_ = static_cast<int*>(memory.counters->mutable_data_ptr());
}

}  // namespace ridgeline
