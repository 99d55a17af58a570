// The architecture that this code is compiled for, as a number such as 75, 80 or 90.
#pragma once

namespace ridgeline {

#ifdef __CUDA_ARCH__
inline constexpr int kSm = __CUDA_ARCH__ / 10;
#else
inline constexpr int kSm = 80;
#endif

// Threads that one SM holds at once.
inline constexpr int kThreadsOfSm = kSm < 80 ? 1024 : kSm == 80 || kSm / 10 == 9 ? 2048 : 1536;

}  // namespace ridgeline
