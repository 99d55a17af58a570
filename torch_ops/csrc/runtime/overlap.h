// Checks of what an op writes.
#pragma once

#include "runtime/check.h"

namespace ridgeline {

// Fails when two indices of the tensor are one address (an expanded view).
void check_writable(const Arg& arg);

// Fails when two tensors surely share an element. Views that interleave in one buffer, such as q
// and k of a fused projection, pass: they share none. So sure means that both are dense, or that
// both start at one address.
void check_distinct(const Arg& arg, const Arg& as);

// As check_distinct for an output that may be exactly the input.
void check_out(const Arg& out, const Arg& input);

}  // namespace ridgeline
