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
// What a call leaves cleared for captures at least, what it clears at a time, and how often: a
// capture takes a kilobyte or two, and nobody tells when its graph is gone.
constexpr int kCountersAhead = 1 << 14;
constexpr int kCountersOfSlab = 1 << 18;
constexpr int kMostSlabs = 16;

// Counters that belong to a stream, or to one in a capture.
struct Counters {
  std::optional<Tensor> memory;
  int* data = nullptr;
  int count = 0;
};

struct StreamMemory {
  const CUstream stream;
  StreamMemory* const next;
  std::mutex mutex;
  std::optional<Tensor> bytes;
  int64_t num_bytes = 0;
  Counters counters;
  uint64_t capture = 0;
  Counters of_capture;
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
  auto* made = new StreamMemory{stream, all[device.index].load(), {}, {}, 0, {}, 0, {}};
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

// The number of the capture that a stream is in, or 0.
uint64_t capture_of(CUstream stream) {
  CaptureStatus status = CaptureStatus::kNone;
  uint64_t id = 0;
  driver_check(driver().stream_get_capture_info(stream, &status, &id, nullptr, nullptr, nullptr),
               "asking for the state of a stream");
  return status == CaptureStatus::kNone ? 0 : id;
}

// Cleared counters that captures take from.
class CaptureCounters {
 public:
  static CaptureCounters& of(const Device& device) {
    static std::array<CaptureCounters, kMaxDevices> all;
    return all[device.index];
  }

  // Sees to it that there are some, once the stream has come to this point.
  void prepare(const Device& device, CUstream stream) {
    if (left_.load(std::memory_order_relaxed) >= kCountersAhead) return;
    const std::lock_guard lock(mutex_);
    if (left_.load() >= kCountersAhead || num_slabs_ == kMostSlabs) return;
    const DeviceScope current(device);
    const Tensor slab = allocate(device, stream, kCountersOfSlab * int64_t{sizeof(int)}, true);
    if (!cleared_) {
      driver_check(driver().event_create(&cleared_, EventFlag::kDisableTiming), "making an event");
    }
    driver_check(driver().event_record(cleared_, stream), "recording an event");
    ++num_slabs_;
    slab_ = slab;
    is_cleared_ = false;
    left_ = kCountersOfSlab;
  }

  // Some that nobody else gets, or null.
  int* take(int count) {
    const std::lock_guard lock(mutex_);
    const int left = left_.load();
    if (left < count) return nullptr;
    if (!is_cleared_) {
      const RelaxedCapture relaxed;
      is_cleared_ = driver().event_query(cleared_) == kCudaSuccess;
    }
    if (!is_cleared_) return nullptr;
    left_ = left - count;
    return static_cast<int*>(slab_->mutable_data_ptr()) + (kCountersOfSlab - left);
  }

 private:
  std::mutex mutex_;
  std::optional<Tensor> slab_;
  CUevent cleared_ = nullptr;
  bool is_cleared_ = false;
  int num_slabs_ = 0;
  std::atomic<int> left_ = 0;
};

}  // namespace

Workspace::Workspace(const Device& device, int64_t num_bytes, int num_counters) {
  const CUstream stream = current_stream(device);
  const uint64_t capture = capture_of(stream);
  if (!aoti_torch_create_cuda_stream_guard || capture != 0) {
    own_ = empty(device.index, {num_bytes}, Dtype::Byte);
    data_ = own_->mutable_data_ptr();
    if (num_counters == 0 || capture == 0) return;
    StreamMemory& memory = memory_of(device, stream);
    const std::lock_guard lock(memory.mutex);
    if (memory.capture != capture || memory.of_capture.count < num_counters) {
      memory.of_capture.data = CaptureCounters::of(device).take(num_counters);
      memory.of_capture.count = memory.of_capture.data ? num_counters : 0;
      memory.capture = capture;
    }
    counters_ = memory.of_capture.data;
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
  CaptureCounters::of(device).prepare(device, stream);
  Counters& counters = memory.counters;
  if (counters.count < num_counters) {
    const int wanted = std::max(kFewestCounters, num_counters);
    counters.memory = allocate(device, stream, wanted * int64_t{sizeof(int)}, true);
    counters.data = static_cast<int*>(counters.memory->mutable_data_ptr());
    counters.count = wanted;
  }
  counters_ = counters.data;
}

}  // namespace ridgeline
