// packbits, segment_packbits: schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>
#include <tuple>

#include "quantization/params.h"
#include "runtime/alloc.h"
#include "runtime/catalog.h"
#include "runtime/check.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"

namespace ridgeline {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxSegmentBits = (int64_t{1} << 31) - 1;
constexpr int64_t kBitsPerBlock = 16 * int64_t{kPackThreads};
// Up to here a warp takes one round, so that there are more warps.
constexpr int64_t kFewBytes = int64_t{1} << 20;
constexpr const char* kPackbits = "quantization/packbits.cuh:packbits";
constexpr const char* kOffsets = "quantization/segment_packbits.cuh:segment_offsets";
constexpr const char* kSegments = "quantization/segment_packbits.cuh:segment_packbits";

std::vector<Row> packbits_rows() {
  return {
      {.op = "packbits",
       .kernel = kernel_name(kPackbits, 16),
       .block = kPackThreads,
       .why = "16-byte accesses"},
      {.op = "packbits",
       .kernel = kernel_name(kPackbits, 1),
       .block = kPackThreads,
       .why = "views that are not aligned to 16 bytes or have gaps"},
      {.op = "segment_packbits",
       .kernel = kernel_name(kSegments, "true"),
       .block = kPackThreads,
       .why = "up to 256 segments, in one launch"},
      {.op = "segment_packbits",
       .kernel = kOffsets,
       .block = kScanThreads,
       .why = "more: where each segment's bytes begin"},
      {.op = "segment_packbits",
       .kernel = kernel_name(kSegments, "false"),
       .block = kPackThreads,
       .why = "more: the bits"},
  };
}

Choice packbits_choose(const std::string& op, const Config&, int) {
  if (op == "packbits") return {{kernel_name(kPackbits, 16)}, {}};
  // What is called follows from the number of segments.
  return {{kernel_name(kSegments, "true"), kOffsets, kernel_name(kSegments, "false")}, {}};
}

const RegisterFamily family({{"packbits", "segment_packbits"}, packbits_rows, packbits_choose});

void check_bits(const Arg& x) {
  check_cuda(x);
  check_dtype(x, {Dtype::Bool, Dtype::Byte});
  check_rank(x, {1});
}

Tensor packbits(const Tensor& x, bool big) {
  static Kernel& wide = kernel(kernel_name(kPackbits, 16));
  static Kernel& narrow = kernel(kernel_name(kPackbits, 1));
  const Arg arg{"packbits", "x", x};
  check_bits(arg);
  const int64_t num_bits = x.size(0);
  const int64_t num_blocks = (num_bits + kBitsPerBlock - 1) / kBitsPerBlock;
  if (num_blocks > kMaxBlocks) {
    fail(arg.op, arg.name, "fewer than 2^43 bits", std::to_string(num_bits), "Split the call");
  }
  const Tensor packed = empty(x, {(num_bits + 7) / 8}, Dtype::Byte);
  const PackbitsParams params{static_cast<const uint8*>(x.const_data_ptr()),
                              static_cast<uint8*>(packed.mutable_data_ptr()), x.stride(0), num_bits,
                              big};
  const bool fits = is_aligned16(Arg("packbits", "x", x)) && (x.stride(0) == 1 || num_bits <= 1);
  launch(fits ? wide : narrow, device(x.get_device_index()),
         {.grid_x = static_cast<uint32>(num_blocks), .block = kPackThreads}, &params);
  return packed;
}

std::tuple<Tensor, Tensor> segment_packbits(const Tensor& x, const Tensor& indptr, bool big) {
  constexpr const char* kOp = "segment_packbits";
  static Kernel& offsets = kernel(kOffsets);
  static const std::array segments = {&kernel(kernel_name(kSegments, "false")),
                                      &kernel(kernel_name(kSegments, "true"))};
  const Arg arg{kOp, "x", x}, indptr_arg{kOp, "indptr", indptr};
  check_bits(arg);
  check_same_device(indptr_arg, arg);
  check_dtype(indptr_arg, {Dtype::Int});
  check_rank(indptr_arg, {1});
  check_last_stride(indptr_arg);
  const int64_t num_bits = x.size(0), num_segments = indptr.size(0) - 1;
  if (num_segments < 0) {
    fail(kOp, "indptr", "shape [num_segments + 1]", shape_text(indptr),
         "No segments have one number, 0");
  }
  // Every segment fills at most 7 bits that are not there; whole words, as the kernel writes.
  const int64_t num_bytes = num_segments == 0 ? 0 : ((num_bits + 7 * num_segments) / 8 + 3) / 4 * 4;
  if (num_bits > kMaxSegmentBits || num_bytes > kMaxSegmentBits) {
    fail(kOp, "x", "fewer than 2^31 bits", std::to_string(num_bits), "Split the call");
  }
  const Tensor packed = empty(x, {num_bytes}, Dtype::Byte);
  const Tensor new_indptr = empty(x, {num_segments + 1}, Dtype::Int);
  const SegmentPackbitsParams params{static_cast<const uint8*>(x.const_data_ptr()),
                                     static_cast<const int32*>(indptr.const_data_ptr()),
                                     static_cast<int32*>(new_indptr.mutable_data_ptr()),
                                     static_cast<uint8*>(packed.mutable_data_ptr()),
                                     x.stride(0),
                                     static_cast<uint32>(num_bits),
                                     static_cast<uint32>(num_segments),
                                     static_cast<uint32>(num_bytes),
                                     num_bytes <= kFewBytes ? 1 : kPackRounds,
                                     big};
  const Device& gpu = device(x.get_device_index());
  const bool few = num_segments <= kFewSegments;
  if (!few) launch(offsets, gpu, {.grid_x = 1, .block = kScanThreads}, &params);
  const int64_t bytes_per_block = int64_t{kPackThreads / 32} * kPackBytes * params.num_rounds;
  // At least one block, for new_indptr.
  const int64_t num_blocks =
      std::max<int64_t>((num_bytes + bytes_per_block - 1) / bytes_per_block, 1);
  launch(*segments[few], gpu, {.grid_x = static_cast<uint32>(num_blocks), .block = kPackThreads},
         &params);
  return {packed, new_indptr};
}

}  // namespace

static void schemas(Library& m) {
  m.def("packbits(Tensor x, bool big=True) -> Tensor");
  m.def("segment_packbits(Tensor x, Tensor indptr, bool big=True) -> (Tensor, Tensor)");
}

static void kernels(Library& m) {
  m.impl("packbits", TORCH_BOX(&packbits));
  m.impl("segment_packbits", TORCH_BOX(&segment_packbits));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
