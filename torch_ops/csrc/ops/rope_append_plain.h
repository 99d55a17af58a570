// The kernel for the most common calls of rope_append_paged_kv_cache.
#pragma once

#include <string>
#include <vector>

#include "ops/cache_cast.h"
#include "rope/params.h"
#include "runtime/catalog.h"
#include "runtime/kernel.h"

namespace ridgeline {

struct RopePlainCall {
  Conversion types;
  bool interleave;
  int64_t head_dim, head_dim_vo;
  const RopeAppendParams& params;  // for vectors of 16 bytes
};

// Whether heads and types are such as the kernel serves.
bool serves_plain(const Conversion& types, int64_t head_dim, int64_t rotary_dim);

std::string plain_name(const Conversion& types, bool interleave, bool norms);

// Its rows of the core table for one pair of types; none where it does not serve them.
std::vector<Row> rope_plain_rows(const char* op, const Conversion& types);

// Whether the kernel serves the call.
bool is_rope_plain(const RopePlainCall& call);

void launch_rope_plain(const RopePlainCall& call, const Device& device);

}  // namespace ridgeline
