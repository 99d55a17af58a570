// copy_pages, copy_pages_inplace: schemas, checks, choice of kernel, launch.

#include <algorithm>
#include <array>

#include "page/params.h"
#include "runtime/catalog.h"
#include "runtime/host_memory.h"
#include "runtime/kernel.h"
#include "runtime/names.h"
#include "runtime/ops.h"
#include "runtime/overlap.h"
#include "runtime/paged_cache.h"
#include "runtime/vector_width.h"

namespace ridgeline {
namespace {

constexpr uint32 kFewChunks = 128;
constexpr const char* kCopyPages = "page/copy_pages.cuh:copy_pages";

std::string copy_name(int num_bytes) {
  return kernel_name(kCopyPages, num_bytes);
}

std::vector<Row> copy_rows() {
  std::vector<Row> rows;
  for (const char* op : {"copy_pages", "copy_pages_inplace"}) {
    add_vector_rows(rows, op, copy_name, kPageThreads);
  }
  return rows;
}

Choice copy_choose(const std::string&, const Config&, int) {
  return {{copy_name(kVectorBytes)}, {}};
}

const RegisterFamily family({{"copy_pages", "copy_pages_inplace"}, copy_rows, copy_choose});

// Pages of one pool and where they go in another.
struct Side {
  Arg source;
  Arg target;
};

void check_pages(const Side& side) {
  const Arg& source = side.source;
  const Arg& target = side.target;
  check_rank(source, {4});
  check_rank(target, {4});
  check_same_dtype(target, source);
  const auto sizes = target.tensor.sizes();
  const auto from = source.tensor.sizes();
  if (!std::equal(sizes.begin() + 1, sizes.end(), from.begin() + 1)) {
    fail(target.op, target.name,
         std::string("pages like those of '") + source.name + "', " + shape_text(source.tensor),
         shape_text(target.tensor),
         "Both pools need one page size, layout, number of heads and head_dim");
  }
  check_last_stride(source);
  check_last_stride(target);
  check_writable(target);
}

// Whether the bytes of a page lie one behind the other.
bool is_run(const Tensor& pages) {
  const int64_t inner = pages.size(3), outer = pages.size(2) * inner;
  return (pages.size(2) == 1 || pages.stride(2) == inner) &&
         (pages.size(1) == 1 || pages.stride(1) == outer);
}

CopyTensor copy_tensor(const Side& side, int64_t num_copies, int vec_size, const Device& gpu) {
  const Tensor& from = side.source.tensor;
  const Tensor& to = side.target.tensor;
  const auto unit = static_cast<int64_t>(from.element_size());
  const int64_t vecs_per_inner = from.size(3) * unit / vec_size;
  const int64_t num_vecs = from.size(1) * from.size(2) * vecs_per_inner;
  const int64_t num_chunks = (num_vecs + kPageChunk - 1) / kPageChunk;
  if (num_vecs > kMaxCount || num_chunks * num_copies > kMaxCount / 2) {
    fail(side.source.op, "src_pages",
         "at most 2^30 chunks of " + std::to_string(kPageChunk) + " vectors in all",
         std::to_string(num_copies) + " pages of " + std::to_string(num_chunks), "Split the call");
  }
  CopyTensor tensor;
  tensor.source = device_address(side.source, gpu);
  tensor.target = device_address(side.target, gpu);
  tensor.source_page_stride = from.stride(0) * unit;
  tensor.source_outer_stride = from.stride(1) * unit;
  tensor.source_inner_stride = from.stride(2) * unit;
  tensor.target_page_stride = to.stride(0) * unit;
  tensor.target_outer_stride = to.stride(1) * unit;
  tensor.target_inner_stride = to.stride(2) * unit;
  tensor.num_vecs = static_cast<uint32>(num_vecs);
  tensor.team_size = page_team(std::min(tensor.num_vecs, kPageChunk));
  tensor.num_rows = static_cast<uint32>(num_chunks * num_copies);
  tensor.is_plain = tensor.num_rows <= kFewChunks && is_run(from) && is_run(to);
  tensor.chunks_per_page = make_divider(static_cast<uint32>(std::max<int64_t>(num_chunks, 1)));
  tensor.vecs_per_inner = make_divider(static_cast<uint32>(std::max<int64_t>(vecs_per_inner, 1)));
  tensor.num_inner = make_divider(static_cast<uint32>(std::max<int64_t>(from.size(2), 1)));
  return tensor;
}

uint32 blocks_of(const CopyTensor& tensor) {
  const uint32 rows_per_block = kPageThreads / tensor.team_size;
  return (tensor.num_rows + rows_per_block - 1) / rows_per_block;
}

void check_same_pages(const Arg& k, const Arg& v) {
  if (k.tensor.size(0) == v.tensor.size(0)) return;
  fail(v.op, v.name, std::to_string(k.tensor.size(0)) + " pages, as '" + k.name + "'",
       shape_text(v.tensor), "Keys and values of a token lie in the same page");
}

void copy(const std::array<Side, 2>& sides, const Tensor& src_pages, const Tensor& dst_pages) {
  static const VectorKernels kernels(copy_name);
  const char* op = sides[0].source.op;
  const Arg source_pages{op, "src_pages", src_pages}, target_pages{op, "dst_pages", dst_pages};
  check_cuda(source_pages);
  check_rank(source_pages, {1});
  const int64_t num_copies = src_pages.size(0);
  const Indices from = indices_of(source_pages, num_copies, "[num_copies]", source_pages);
  const Indices to =
      indices_of(target_pages, num_copies, "[num_copies], as 'src_pages'", source_pages);
  VectorWidth width;
  for (const Side& side : sides) {
    check_pages(side);
    width.add(side.source.tensor, side.source.tensor.size(3));
    width.add(side.target.tensor, side.target.tensor.size(3));
  }
  check_same_pages(sides[0].source, sides[1].source);
  check_same_pages(sides[0].target, sides[1].target);
  const int vec_size = width.bytes();
  const Device& gpu = device(src_pages.get_device_index());
  const CopyPagesParams params{{copy_tensor(sides[0], num_copies, vec_size, gpu),
                                copy_tensor(sides[1], num_copies, vec_size, gpu)},
                               from,
                               to,
                               sides[0].source.tensor.size(0),
                               sides[0].target.tensor.size(0)};
  if (params.num_source_pages == 0 || params.num_target_pages == 0) return;
  launch(kernels.of(vec_size), gpu,
         {.grid_x = 2 * std::max(blocks_of(params.tensors[0]), blocks_of(params.tensors[1])),
          .block = kPageThreads},
         &params);
}

void copy_pages(const Tensor& src_k_cache, const Tensor& src_v_cache, const Tensor& dst_k_cache,
                const Tensor& dst_v_cache, const Tensor& src_pages, const Tensor& dst_pages) {
  constexpr const char* kOp = "copy_pages";
  copy({Side{{kOp, "src_k_cache", src_k_cache}, {kOp, "dst_k_cache", dst_k_cache}},
        Side{{kOp, "src_v_cache", src_v_cache}, {kOp, "dst_v_cache", dst_v_cache}}},
       src_pages, dst_pages);
}

void copy_pages_inplace(const Tensor& k_cache, const Tensor& v_cache, const Tensor& src_pages,
                        const Tensor& dst_pages) {
  const Arg k{"copy_pages", "k_cache", k_cache}, v{"copy_pages", "v_cache", v_cache};
  copy({Side{k, k}, Side{v, v}}, src_pages, dst_pages);
}

}  // namespace

static void schemas(Library& m) {
  m.def(
      "copy_pages(Tensor src_k_cache, Tensor src_v_cache, Tensor(a!) dst_k_cache, "
      "Tensor(b!) dst_v_cache, Tensor src_pages, Tensor dst_pages) -> ()");
  m.def(
      "copy_pages_inplace(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor src_pages, "
      "Tensor dst_pages) -> ()");
}

static void kernels(Library& m) {
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
  m.impl("copy_pages_inplace", TORCH_BOX(&copy_pages_inplace));
}

static const RegisterOps registered(schemas, kernels);

}  // namespace ridgeline
