// Look-up of compiled kernels in the AOT pack and in the disk cache. No Python, no CUDA.
#pragma once

#include <optional>
#include <string>

#include "runtime/entry.h"

namespace ridgeline {

// The architecture whose pack serves `arch`: itself, or a lower minor version of the same major
// one (their cubins run on it); "" when no pack does.
std::string pack_for(const std::string& arch);

// Throws std::runtime_error naming the file when the pack is damaged.
std::optional<Entry> find_in_pack(const std::string& name, const std::string& arch);

// `tag` names the compiler; "" takes an entry of any. A damaged entry is not found, and
// `damaged` names its file.
std::optional<Entry> find_in_cache(const std::string& name, const std::string& arch,
                                   const std::string& tag, std::string* damaged);

}  // namespace ridgeline
