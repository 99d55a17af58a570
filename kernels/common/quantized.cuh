// The 8-bit types that numbers are quantized to.
#pragma once

#include "common/fp8.cuh"
#include "common/int8.cuh"

namespace ridgeline {

// The largest finite number of a type.
template <class T>
inline constexpr float kLargest = 0.0f;
template <>
inline constexpr float kLargest<__nv_fp8_e4m3> = 448.0f;
template <>
inline constexpr float kLargest<__nv_fp8_e5m2> = 57344.0f;
template <>
inline constexpr float kLargest<int8> = 127.0f;

}  // namespace ridgeline
