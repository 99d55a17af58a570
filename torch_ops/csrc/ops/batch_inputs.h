// Arguments of the batch attention ops: their checks, and what shapes alone tell. The contents of
// index tensors stay on the device.
#pragma once

#include <array>

#include "attention/batch_params.h"
#include "ops/attention_options.h"
#include "runtime/paged_cache.h"

namespace ridgeline {

inline constexpr int64_t kMaxBatchCount = int64_t{1} << 30;  // of tokens, pages and rows

// The argument `flags`, as torch_ops/_batch_attention_cpu.py has it.
enum Flag : int64_t { kHnd = 1, kCausal = 2, kInvariant = 4, kLensAreTokens = 8 };
inline constexpr int64_t kAllFlags = 15;

// Beside these, as torch_ops/_list_report.py has it: one of two with an upper half, the number of a
// report that the caller asks for or the tag of a list that leaves nothing to do behind its
// records.
inline constexpr int64_t kAsksForReport = 16, kIsComplete = 32;

struct BatchOptions {
  int64_t flags = 0;
  int64_t window_left = -1;
  LogitOptions logits;
  int complete_tag = 0;  // 0: not known
  uint32_t report = 0;   // 0: not asked for
  bool single = false;   // one request with all queries and keys, which are [tokens, heads, dim]

  bool has(Flag flag) const { return (flags & flag) != 0; }
};

// Flags that say something else stay whole, and check_inputs refuses them.
inline BatchOptions options_of(int64_t flags, int64_t window_left) {
  const auto upper = static_cast<uint32_t>(static_cast<uint64_t>(flags) >> 32);
  const int64_t said = flags & (kAsksForReport | kIsComplete);
  const int64_t others = (flags & 0xffffffff) - said;
  const bool of_a_list =
      upper != 0 && (said == kAsksForReport || said == kIsComplete) && others <= kAllFlags;
  return {.flags = of_a_list ? others : flags,
          .window_left = window_left,
          .logits = {},
          .complete_tag = of_a_list && said == kIsComplete ? static_cast<int>(upper) : 0,
          .report = of_a_list && said == kAsksForReport ? upper : 0};
}

// What the scheduler is asked for; from index tensors and head counts.
struct Lengths {
  const char* op;
  const MaybeTensor& qo_indptr;
  const MaybeTensor& kv_indptr;
  const MaybeTensor& kv_lens;
  int64_t flags;
  int64_t page_size;
  int64_t num_tokens;
  int64_t num_qo_heads, num_kv_heads;
  int64_t head_dim_qk, head_dim_vo;
  int64_t max_q_len;
  int64_t window_left;
  KvForm form;
  int64_t single_kv_len = 0;  // of kSingle
  int64_t batch_size = 0;     // check_lengths finds it

  int64_t group_size() const { return num_qo_heads / num_kv_heads; }
};

// The cache as tokens of heads, whatever its form and layout.
struct Cache {
  int64_t outer;   // pages, or rows of the batch; 1 when ragged
  int64_t tokens;  // of a page, of a row, or of all requests
  int64_t num_heads;
  int outer_dim, token_dim, head_dim;  // -1: there is none
};

class Inputs {
 public:
  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
         const MaybeTensor& qo_indptr, const MaybeTensor& kv_indptr, const MaybeTensor& kv_indices,
         const MaybeTensor& kv_lens, const MaybeTensor& schedule)
      : q(op, "q", q),
        k_(op, "k", k, 0),
        v_(op, "v", v, 1),
        k(k_.arg()),
        v(v_.arg()),
        qo_indptr(qo_indptr),
        kv_indptr(kv_indptr),
        kv_indices(kv_indices),
        kv_lens(kv_lens),
        schedule(schedule) {}

  const Arg q;

 private:
  const HalfCache k_, v_;

 public:
  const Arg &k, &v;
  const MaybeTensor& qo_indptr;
  const MaybeTensor& kv_indptr;
  const MaybeTensor& kv_indices;
  const MaybeTensor& kv_lens;
  const MaybeTensor& schedule;
};

KvForm form_of(bool paged, bool ragged, int64_t flags);

// Fails unless there is a tensor that tells where requests begin and end.
void check_length_tensors(const Lengths& of);
void check_lengths(Lengths& of, const Arg& as);

// Checks a call's arguments; `cache` gets the form of its keys.
Lengths check_inputs(const Inputs& in, const BatchOptions& options, int64_t max_q_len,
                     Cache& cache);

// A number below kTagSizes that tells configurations apart, going on from `config`.
int64_t list_config(const Lengths& of, int64_t config);

// Words of the work list: as torch_ops/_batch_attention_cpu.py has it, for the fakes.
int64_t list_length(const Lengths& of);

void check_list(const Arg& list, int64_t length, const Arg& as);

}  // namespace ridgeline
