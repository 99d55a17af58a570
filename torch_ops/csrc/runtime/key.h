// The key of a compiled kernel: a digest of its name, architecture, options and source closure.
#pragma once

#include <string>

namespace ridgeline {

inline constexpr const char* kCompileOptions = "-std=c++17 -default-device";

// Throws std::runtime_error when the name is malformed or a source file is missing.
std::string entry_key(const std::string& name, const std::string& arch);

}  // namespace ridgeline
