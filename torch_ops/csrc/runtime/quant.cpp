#include "runtime/quant.h"

#include <cmath>
#include <string>
#include <vector>

#include "runtime/overlap.h"

namespace ridgeline {

QuantScale given_scale(const Arg& what, const std::optional<Tensor>& scale, double value) {
  if (!scale) {
    const auto number = static_cast<float>(value);
    if (!std::isnormal(number) || number < 0) {
      fail(what.op, "scale", "a number > 0, a normal one of float32", std::to_string(value),
           "Pass what an 8-bit number is to be multiplied with to get the real one");
    }
    return {.given = nullptr, .computed = nullptr, .stride = 0, .value = number};
  }
  const Arg arg{what.op, "scale", *scale};
  check_same_device(arg, what);
  check_dtype(arg, {Dtype::Float});
  if (scale->numel() != 1) {
    fail(what.op, "scale", "1 element", "shape " + shape_text(arg.sizes),
         "The scale is one for the whole tensor; None computes one for each row");
  }
  return {.given = static_cast<const float*>(scale->const_data_ptr()),
          .computed = nullptr,
          .stride = 0,
          .value = 1.0f};
}

QuantScale row_scale(const Arg& what, const std::optional<Tensor>& scale, double value,
                     const std::optional<Tensor>& token_scale) {
  if (!token_scale) return given_scale(what, scale, value);
  const Arg arg{what.op, "token_scale", *token_scale};
  if (scale) {
    fail(what.op, "scale", "None beside 'token_scale'", "a tensor", "Pass one of the two");
  }
  check_same_device(arg, what);
  check_dtype(arg, {Dtype::Float});
  std::vector<int64_t> shape(what.sizes.begin(), what.sizes.end());
  shape.back() = 1;
  check_shape(arg, shape, "[..., 1]");
  if (!token_scale->is_contiguous()) {
    fail(what.op, arg.name, "a contiguous tensor", "strides " + shape_text(arg.strides),
         "Pass torch.empty of that shape");
  }
  check_distinct(arg, what);
  return {.given = nullptr,
          .computed = static_cast<float*>(token_scale->mutable_data_ptr()),
          .stride = 0,
          .value = 1.0f};
}

}  // namespace ridgeline
