// Integer names shared by device code and host code. Plain C++17: NVRTC brings no <stdint.h>.
#pragma once

namespace ridgeline {

using int8 = signed char;
using int32 = int;
using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

static_assert(sizeof(int32) == 4 && sizeof(int64) == 8 && sizeof(uint16) == 2, "integer widths");

}  // namespace ridgeline
