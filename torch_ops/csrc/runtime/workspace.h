// Scratch memory of ops, kept from call to call.
#pragma once

#include <mutex>
#include <optional>

#include "runtime/device.h"
#include "runtime/tensor.h"

namespace ridgeline {

// Memory for what a call launches on the device's current stream. Every stream has its own, which
// grows and is never given back: an allocation for each call costs the host 2 us. Calls on one
// stream follow each other on the GPU, so they may share it; the object holds the stream's turn, so
// that launches of two threads do not mix. While a graph is being captured the memory is the
// call's own, from the graph's pool.
//
// Counters belong to the stream too: zeros, which a launch leaves as zeros. A captured call has
// none, since nothing would clear memory of the graph's pool before each replay.
class Workspace {
 public:
  Workspace(const Device& device, int64_t num_bytes, int num_counters);
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }
  int* counters() const { return counters_; }  // null: none were asked for, or there are none

 private:
  std::unique_lock<std::mutex> turn_;
  std::optional<Tensor> own_;
  void* data_ = nullptr;
  int* counters_ = nullptr;
};

}  // namespace ridgeline
