// How a family registers its ops with torch.
#pragma once

#include <torch/csrc/stable/library.h>

namespace ridgeline {

using Library = torch::stable::detail::StableLibrary;

// Registers the ops that `schemas` defines and `kernels` implements for CUDA, in two namespaces:
// - torch.ops.ridgeline, where Python adds a check that refuses inputs that require grad;
// - torch.ops.ridgeline_unguarded, where the dispatcher passes over the autograd keys. It is what
//   the Python functions call, which have checked already, since a check costs a microsecond there.
class RegisterOps {
 public:
  using Fill = void (*)(Library& library);
  RegisterOps(Fill schemas, Fill kernels);
};

}  // namespace ridgeline
