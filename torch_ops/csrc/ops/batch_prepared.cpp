// attention_prepare, attention_prepared, attention_prepared_lse: calls that differ from an earlier
// one in the addresses of their tensors alone. What else a call asks is settled once, and its index
// tensors stay here: on the way of all calls that takes the host 2 of 10 us.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "ops/batch_launch.h"
#include "runtime/alloc.h"
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr int64_t kSlotBits = 20;

template <class T, class Handle>
T asked(AOTITorchError (*question)(Handle, T*), AtenTensorHandle tensor) {
  T answer{};
  if (question(tensor, &answer) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch did not answer a question about a tensor");
  }
  return answer;
}

const char* address_of(AtenTensorHandle tensor) {
  return static_cast<const char*>(asked(&torch_get_const_data_ptr, tensor));
}

// What a call knows of a tensor beside its address.
class Look {
 public:
  explicit Look(const Arg& arg)
      : dtype_(asked(&aoti_torch_get_dtype, arg.tensor.get())),
        device_type_(asked(&aoti_torch_get_device_type, arg.tensor.get())),
        gpu_(arg.gpu),
        rank_(asked(&aoti_torch_get_dim, arg.tensor.get())),
        offset_(static_cast<const char*>(arg.data) - address_of(arg.tensor.get())) {
    std::copy_n(asked(&aoti_torch_get_sizes, arg.tensor.get()), rank_, sizes_.begin());
    std::copy_n(asked(&aoti_torch_get_strides, arg.tensor.get()), rank_, strides_.begin());
  }

  // Whether a tensor looks alike; then `data` gets its address.
  bool fits(AtenTensorHandle tensor, const void*& data) const {
    data = address_of(tensor) + offset_;
    return asked(&aoti_torch_get_dtype, tensor) == dtype_ &&
           asked(&aoti_torch_get_device_index, tensor) == gpu_ &&
           asked(&aoti_torch_get_device_type, tensor) == device_type_ &&
           asked(&aoti_torch_get_dim, tensor) == rank_ &&
           std::equal(sizes_.begin(), sizes_.begin() + rank_,
                      asked(&aoti_torch_get_sizes, tensor)) &&
           std::equal(strides_.begin(), strides_.begin() + rank_,
                      asked(&aoti_torch_get_strides, tensor)) &&
           reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }

 private:
  int32_t dtype_, device_type_, gpu_;
  int64_t rank_;
  int64_t offset_;  // of what is looked at, in bytes: half of a stacked cache
  std::array<int64_t, 5> sizes_{}, strides_{};
};

// An index tensor that must stay what it was.
struct Kept {
  Tensor tensor;
  const char* data;
  int64_t size;

  explicit Kept(const Tensor& kept)
      : tensor(kept), data(address_of(kept.get())), size(kept.size(0)) {}
  bool is_same() const {
    return address_of(tensor.get()) == data && *asked(&aoti_torch_get_sizes, tensor.get()) == size;
  }
};

struct Prepared {
  Look q, k, v;
  std::vector<Kept> index;
  BatchCall call;
  std::array<int64_t, 3> out_shape;
  Dtype dtype;
  std::shared_ptr<const Prepared> other;  // that the same number serves
};

// Prepared calls by number. Numbers are not used twice: those of calls that are gone find nothing.
class Calls {
 public:
  // Adds a call to those of a number, or under a number of its own; 0: there are too many.
  int64_t add(std::shared_ptr<Prepared> call, int64_t number) {
    const std::lock_guard lock(mutex_);
    if (Slot* const slot = slot_of(number); slot && slot->call) {
      call->other = std::exchange(slot->call, call);
      return number;
    }
    if (free_.empty()) {
      if (slots_.size() >> kSlotBits != 0) return 0;
      free_.push_back(static_cast<int64_t>(slots_.size()));
      slots_.push_back({free_.back(), nullptr});
    }
    Slot& slot = slots_[static_cast<size_t>(free_.back())];
    free_.pop_back();
    slot.number += int64_t{1} << kSlotBits;
    slot.call = std::move(call);
    return slot.number;
  }

  std::shared_ptr<const Prepared> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    Slot* const slot = slot_of(number);
    return slot ? slot->call : nullptr;
  }

  // The call itself, to be destroyed without the lock.
  std::shared_ptr<const Prepared> remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    Slot* const slot = slot_of(number);
    if (!slot || !slot->call) return nullptr;
    free_.push_back(number & ((int64_t{1} << kSlotBits) - 1));
    return std::exchange(slot->call, nullptr);
  }

 private:
  struct Slot {
    int64_t number;
    std::shared_ptr<const Prepared> call;
  };

  Slot* slot_of(int64_t number) {
    const auto place = static_cast<size_t>(number & ((int64_t{1} << kSlotBits) - 1));
    return place < slots_.size() && slots_[place].number == number ? &slots_[place] : nullptr;
  }

  std::mutex mutex_;
  std::vector<Slot> slots_;
  std::vector<int64_t> free_;
};

Calls& calls() {
  // Never destroyed: when the process ends, torch may be gone first.
  static auto& all = *new Calls;
  return all;
}

int64_t attention_prepare(const Tensor& q, const Tensor& k, const Tensor& v,
                          const MaybeTensor& kv_indices, const Tensor& schedule, int64_t beside,
                          const MaybeTensor& qo_indptr, int64_t flags, int64_t max_q_len,
                          int64_t window_left, const std::optional<double>& sm_scale,
                          double logits_soft_cap, int64_t pos_encoding_mode, double rope_scale,
                          double rope_theta, bool use_fp16_qk_reduction) {
  constexpr const char* kOp = "attention_prepare";
  const MaybeTensor none, list = schedule;
  const Inputs in(kOp, q, k, v, qo_indptr, none, kv_indices, none, list);
  BatchOptions options = options_of(flags, window_left);
  Cache cache;
  const Lengths of = check_inputs(in, options, max_q_len, cache);
  options.logits = logit_options(in.q, scale_or_default(sm_scale, of.head_dim_qk), logits_soft_cap,
                                 pos_encoding_mode, rope_scale, rope_theta, use_fp16_qk_reduction);
  if (of.num_tokens == 0) return 0;
  const BatchResults results = {nullptr, of.num_qo_heads * of.head_dim_vo, of.head_dim_vo, nullptr};
  auto made =
      std::make_shared<Prepared>(Prepared{Look(in.q),
                                          Look(in.k),
                                          Look(in.v),
                                          {},
                                          prepare_attention(in, of, options, cache, results),
                                          {of.num_tokens, of.num_qo_heads, of.head_dim_vo},
                                          in.q.dtype,
                                          nullptr});
  for (const MaybeTensor* index : {&list, &kv_indices, &qo_indptr}) {
    if (*index) made->index.emplace_back(**index);
  }
  return calls().add(std::move(made), beside);
}

// A result that is there.
StableIValue given(OwnedTensor tensor) {
  return torch::stable::detail::from(
      new StableIValue(torch::stable::detail::from(tensor.release())));
}

// Runs a call, where the tensors are such as it was prepared for.
template <bool kLse>
bool run(const Prepared& prepared, std::span<const OwnedTensor, 3> operands,
         StableIValue* results) {
  BatchCall call = prepared.call;
  AttentionParams& attention = call.params.attention;
  if (!prepared.q.fits(operands[0].get(), attention.q) ||
      !prepared.k.fits(operands[1].get(), attention.k) ||
      !prepared.v.fits(operands[2].get(), attention.v) ||
      !std::ranges::all_of(prepared.index, &Kept::is_same)) {
    return false;
  }
  const std::span<const int64_t> shape = prepared.out_shape;
  OwnedTensor out = empty_owned(call.gpu->index, shape, prepared.dtype), lse;
  attention.out = asked(&torch_get_mutable_data_ptr, out.get());
  if (kLse) {
    lse = empty_owned(call.gpu->index, shape.first(2), Dtype::Float);
    attention.lse = static_cast<float*>(asked(&torch_get_mutable_data_ptr, lse.get()));
  }
  launch_attention(call);
  results[0] = given(std::move(out));
  if (kLse) results[1] = given(std::move(lse));
  return true;
}

// q, k, v and a number to the results, or to None each where the call is another one: its tensors
// look different, an index tensor has changed, or it is captured into a graph.
template <bool kLse>
void attention_prepared(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  std::array<OwnedTensor, 3> operands;
  for (size_t i = 0; i < 3; ++i) operands[i].reset(to<AtenTensorHandle>(stack[i]));
  const std::shared_ptr<const Prepared> found = calls().find(to<int64_t>(stack[3]));
  std::fill_n(stack, kLse ? 2 : 1, torch::stable::detail::from(std::nullopt));
  if (!found || is_captured(current_stream(*found->call.gpu))) return;
  for (const Prepared* one = found.get(); one; one = one->other.get()) {
    if (run<kLse>(*one, operands, stack)) return;
  }
}

void schemas(Library& m) {
  m.def(
      "attention_prepare(Tensor q, Tensor k, Tensor v, Tensor? kv_indices, Tensor schedule, "
      "int beside=0, Tensor? qo_indptr=None, int flags=0, SymInt max_q_len=-1, SymInt "
      "window_left=-1, "
      "float? sm_scale=None, float logits_soft_cap=0.0, int pos_encoding_mode=0, "
      "float rope_scale=1.0, float rope_theta=1e4, bool use_fp16_qk_reduction=False) -> int");
  m.def("attention_prepared(Tensor q, Tensor k, Tensor v, int call) -> Tensor?");
  m.def("attention_prepared_lse(Tensor q, Tensor k, Tensor v, int call) -> (Tensor?, Tensor?)");
}

void kernels(Library& m) {
  m.impl("attention_prepare", TORCH_BOX(&attention_prepare));
  m.impl("attention_prepared", &attention_prepared<false>);
  m.impl("attention_prepared_lse", &attention_prepared<true>);
}

const RegisterOps registered(schemas, kernels);

}  // namespace
}  // namespace ridgeline

extern "C" __attribute__((visibility("default"))) void ridgeline_forget_call(int64_t number) {
  ridgeline::calls().remove(number);
}
