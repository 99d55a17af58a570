// The namespace `torch.ops.ridgeline`; each family adds its schemas to it as a fragment.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ridgeline, m) {
  (void)m;
}
