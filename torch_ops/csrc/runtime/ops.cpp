#include "runtime/ops.h"

#include <memory>
#include <vector>

namespace ridgeline {

RegisterOps::RegisterOps(Fill schemas, Fill kernels) {
  // Never destroyed: a library that goes takes its ops along, and torch may be gone by then.
  static auto& libraries = *new std::vector<std::unique_ptr<Library>>;
  for (const char* name : {"ridgeline", "ridgeline_unguarded"}) {
    const auto open = [&](Library::Kind kind, const char* key) -> Library& {
      return *libraries.emplace_back(
          std::make_unique<Library>(kind, name, key, __FILE__, uint32_t{__LINE__}));
    };
    schemas(open(Library::Kind::FRAGMENT, nullptr));
    kernels(open(Library::Kind::IMPL, "CUDA"));
  }
}

}  // namespace ridgeline
