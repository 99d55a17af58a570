// A compiled kernel as packs and the disk cache hold it (docs/packaging.md has the format).
#pragma once

#include <string>
#include <string_view>

namespace ridgeline {

struct Entry {
  std::string name;     // header and template-id
  std::string arch;     // "sm_90a", or "compute_80" for PTX
  std::string kind;     // "cubin" or "ptx"
  std::string lowered;  // the mangled name of the entry function
  std::string key;      // hex digest of sources, options, name and arch
  std::string code;     // the cubin, or PTX with a terminating zero
};

// Checks the checksum and decodes. Throws std::runtime_error that says what is wrong.
Entry parse_entry(std::string_view bytes);

}  // namespace ridgeline
