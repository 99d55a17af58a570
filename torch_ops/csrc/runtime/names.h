// Kernel names: "<header>:<template>", with template arguments joined as the packs spell them.
#pragma once

#include <string>

namespace ridgeline {

inline std::string name_part(const char* text) {
  return text;
}
inline std::string name_part(const std::string& text) {
  return text;
}
inline std::string name_part(int value) {
  return std::to_string(value);
}

// kernel_name("norm/rmsnorm.cuh:rmsnorm", "__half", 8) -> "norm/rmsnorm.cuh:rmsnorm<__half, 8>"
template <class First, class... Rest>
std::string kernel_name(const std::string& entry, const First& first, const Rest&... rest) {
  std::string arguments = name_part(first);
  ((arguments += ", " + name_part(rest)), ...);
  return entry + "<" + arguments + ">";
}

}  // namespace ridgeline
