// What the sampling ops share: their arguments' checks, their kernels by kind of row, and the
// scratch memory between the launches of one call.
#pragma once

#include <array>
#include <optional>
#include <string>

#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "sampling/params.h"

namespace ridgeline {

// What a row's elements are; the order is that of kKindNames in sampling.cpp.
enum class RowKind { HalfLogits, BFloat16Logits, FloatLogits, Probs };

RowKind logits_kind(Dtype dtype);
std::string kind_name(RowKind kind);  // "Logits<__half>" in device code
int wide_vec(RowKind kind);           // elements of 16 bytes

// Elements that the softmax moves at once: 16 bytes of its output. With more of a 16-bit input a
// store would write half of each sector.
inline constexpr int kSoftmaxVec = 4;

// A kernel for each kind, and, when it has them, one for each width of access.
class KindKernels {
 public:
  // `header`: "sampling/draw.cuh:draw"
  explicit KindKernels(const std::string& entry, bool has_widths);
  Kernel& of(RowKind kind, int vec_size = 0) const;

 private:
  std::array<Kernel*, 4> wide_{}, narrow_{};
};

std::string kind_kernel(const std::string& entry, RowKind kind, int vec_size = 0);

// Arguments that are a number or one a row.
struct RowValue {
  const char* name;
  const std::optional<Tensor>& tensor;  // float32, [num_rows] or [1]
  double value;
};
struct RowInteger {
  const char* name;
  const std::optional<Tensor>& tensor;  // int32 or int64, [num_rows] or [1]
  int64_t value;
};

Setting setting_of(const RowValue& value, const Arg& input, int64_t num_rows);
IntSetting integer_of(const RowInteger& value, const Arg& input, int64_t num_rows);
RandomKeys keys_of(const char* op, const Tensor& seed, const std::optional<Tensor>& offset,
                   const Arg& input, int64_t num_rows);

// input [num_inputs, vocab] of an allowed dtype, and which of its rows are read.
RowInput row_input(const Arg& input, std::initializer_list<Dtype> dtypes,
                   const std::optional<Tensor>& indices);
uint32 index_bits_of(uint32 vocab);

// What is made of a row besides its segments' statistics: nothing, lists of candidates, or for
// filters that may keep many also a histogram.
enum class Lists { None, Candidates, Histograms };

// Memory of the launches of one call.
class RowScratch {
 public:
  RowScratch(const Tensor& like, const RowInput& input, Lists lists);
  const Scratch& get() const { return scratch_; }

 private:
  Tensor memory_;
  Scratch scratch_;
};

unsigned num_slice_blocks(const RowInput& input);

// The first launches of most ops: row_segments; or collect_candidates, and behind it find_between
// and list_between when there are histograms.
void launch_collect(const Device& gpu, RowKind kind, const Tensor& input, const CollectParams& how);

// What rows may need: nothing without filters or where all are greedy, histograms where a row's
// top-k may be none or large.
Lists lists_for(const Filters& filters, uint32 vocab);

Filters no_filters();

}  // namespace ridgeline
