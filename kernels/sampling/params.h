// What the sampling kernels are told, and how a row is cut into parts. Shared by the kernels and
// the host.
#pragma once

#include "common/types.h"

namespace ridgeline {

// A warp holds a segment in registers; a block of kCollectThreads holds a slice. Both depend on the
// vocabulary alone, so that a row has the same bits in every batch. A part is some slices in
// succession that one block takes: the fewer rows, the more parts a row is cut into.
constexpr uint32 kSegmentSize = 1024;
constexpr uint32 kCollectThreads = 256;
constexpr uint32 kSegmentsPerSlice = kCollectThreads / 32;
constexpr uint32 kSliceSize = kSegmentSize * kSegmentsPerSlice;
constexpr uint32 kRowThreads = 512;  // of the kernels that give a row to one block
constexpr uint32 kPlainThreads = 256;
constexpr uint32 kSoftmaxThreads = 1024;
constexpr uint32 kClusterThreads = 512;
constexpr uint32 kClusterSegments = kClusterThreads / 32;  // that a block of a cluster holds
constexpr uint32 kMaxCluster = 8;
constexpr uint32 kMaxCollectedK = 256;  // larger top-k thresholds are searched in the whole row
constexpr uint32 kWeightBins = 2048;    // of the histograms that narrow larger sets
constexpr uint32 kPartCapacity = 768;   // candidates of a part; more than that overflow
constexpr uint32 kOverflow = 0xffffffffu;
constexpr int kMassBits = 42;  // a weight of 1 is a mass of 2^42

constexpr uint32 num_segments_of(uint32 vocab) {
  return (vocab + kSegmentSize - 1) / kSegmentSize;
}
constexpr uint32 num_slices_of(uint32 vocab) {
  return (vocab + kSliceSize - 1) / kSliceSize;
}

// Weights of a segment are relative to its largest element.
struct SegmentStats {
  float max;  // NaN: the segment holds a number that no weight can be made of
  uint32 pad;
  uint64 mass;  // sum of the weights
};

// The candidates of a part are all of its elements whose key is at least `bound`.
struct PartInfo {
  uint32 count;  // kOverflow: there is no complete list
  uint32 bound;
};

// What a histogram tells of a row whose set may be large: elements of the bins from `sure` on are
// kept by top-k and top-p, the list takes those of bins [first, sure) and of `k_bin`, where top-k
// ends.
struct alignas(16) Between {
  uint32 listable;  // 0: the histogram does not tell enough, or was not asked
  uint32 first;
  uint32 sure;
  uint32 k_bin;       // kWeightBins: no top-k
  uint32 counted;     // elements of bins that are not listed, above k_bin
  uint32 num_listed;  // of all parts so far
  float max;          // the row's largest element
  uint32 pad;
  float first_from;  // the least elements of bin `first` and the later ones, and so on; infinite
  float sure_from;   // where there are none
  float k_from;
  float gap_from;  // of bin k_bin + 1
  uint64 gap;      // mass of the bins between k_bin and first
  uint64 dropped;  // mass of the sure elements that min-p drops
};

// What a filter leaves of a row: the elements whose composite (order.cuh) is at least `cut`.
struct RowCut {
  uint64 cut;
  float scale;  // of the row's weights: 1 / their kept sum
  uint32 valid;
};

// One number a row, or the same for all.
struct Setting {
  const float* values;  // [num_rows], or null
  int64 stride;
  double value;
};
struct IntSetting {
  const void* values;  // [num_rows] of int32 or int64, or null
  int64 stride;
  int64 value;
  uint32 is_wide;  // int64
};

// Output row r is computed of input row indices[r].
struct RowInput {
  const void* data;  // [num_inputs, vocab]
  int64 row_stride;  // elements
  IntSetting indices;
  uint32 num_inputs;
  uint32 num_rows;
  uint32 vocab;
  uint32 index_bits;  // of vocab - 1
};

struct Filters {
  Setting temperature;
  Setting top_p;
  Setting min_p;
  IntSetting top_k;  // below 1 or from vocab on: off
  uint32 joint;      // top-p is of the whole row's mass, not of what top-k leaves
};

struct Scratch {
  SegmentStats* segments;  // [num_rows, num_segments]
  PartInfo* parts;         // [num_rows, num_parts], or null: nothing was collected
  uint64* candidates;      // [num_rows, row_capacity] composites: of each part kPartCapacity, or
                           // list_between's list; or null
  RowCut* cuts;            // [num_rows]
  uint32* histograms;      // [num_rows, num_parts, kWeightBins] counts, or null
  float* references;       // [num_rows], of the histograms' bins
  Between* between;        // [num_rows]
  uint64* kept;            // [num_rows, num_segments]: mass of the sure elements that are kept
  uint32 num_parts;        // of a row
  uint32 slices_per_part;
  uint32 row_capacity;  // elements of a row's lists
};

struct CollectParams {
  RowInput input;
  Filters filters;
  Scratch scratch;
  uint32 draws;  // rows of temperature 0 are weighed at 1
};

struct NarrowParams {
  RowInput input;
  Filters filters;
  Scratch scratch;
};

struct RandomKeys {
  const int64* seeds;    // [num_rows], or one of stride 0
  const int64* offsets;  // the same, or null: 0
  int64 seed_stride;
  int64 offset_stride;
};

struct DrawParams {
  RowInput input;
  Filters filters;
  Scratch scratch;
  RandomKeys keys;
  int32* tokens;     // [num_rows]
  uint8* valid;      // [num_rows]
  float* log_probs;  // [num_rows]
};

struct CutParams {
  RowInput input;
  Filters filters;
  Scratch scratch;
  uint32 count_only;  // top-k among all elements, whatever their weight
};

struct ApplyParams {
  RowInput input;
  const RowCut* cuts;  // [num_rows]
  const SegmentStats* segments;
  void* output;  // [num_rows, vocab], the input's type, contiguous
};

struct TopKParams {
  RowInput input;
  Scratch scratch;
  void* values;    // [num_rows, k], the input's type
  int64* indices;  // [num_rows, k]
  uint32 k;        // kMaxCollectedK at most
  uint32 sorted;   // the larger first; else by index
};

struct GatherParams {
  RowInput input;
  const RowCut* cuts;  // [num_rows]
  void* values;        // [num_rows, k], the input's type
  int64* indices;      // [num_rows, k]
  uint32 k;
};

struct SoftmaxParams {
  RowInput input;
  Setting temperature;
  const SegmentStats* segments;  // null in the kernel that finds them itself
  float* output;                 // [num_rows, vocab], contiguous
  uint32 num_held;               // segments that shared memory holds
};

struct ChainParams {
  const float* draft_probs;   // [batch, num_draft, vocab]
  const void* draft_tokens;   // [batch, num_draft], int32 or int64
  const float* target_probs;  // [batch, num_draft + 1, vocab]
  int64 draft_strides[2];     // of the batch and of the position, elements
  int64 token_strides[2];
  int64 target_strides[2];
  RandomKeys keys;  // of the batch
  int32* tokens;    // [batch, num_draft + 1]
  int32* accepted;  // [batch]
  int32* emitted;   // [batch]
  uint32 num_draft;
  uint32 vocab;
  uint32 index_bits;
  uint32 wide_tokens;  // int64
};

}  // namespace ridgeline
