// What the ops with 8-bit outputs share: the types, and the scale of a call.
#pragma once

#include <array>
#include <optional>

#include "common/quant_scale.h"
#include "runtime/check.h"
#include "runtime/rows.h"

namespace ridgeline {

// What a fused op stores; quantize() stores fp8 e5m2 too.
inline constexpr std::array kQuantDtypes = {Dtype::Float8_e4m3fn, Dtype::Char};

// The scale of `what` as a caller gave it: a float32 tensor of one element, or the number `value`.
QuantScale given_scale(const Arg& what, const std::optional<Tensor>& scale, double value);

// As given_scale, or, where token_scale is given, one scale a row of `what`, which the kernel
// writes: [..., 1], contiguous.
QuantScale row_scale(const Arg& what, const std::optional<Tensor>& scale, double value,
                     const std::optional<Tensor>& token_scale);

}  // namespace ridgeline
