// Kernel name to code: the AOT pack, then the disk cache, then the compiler that Python installs.
#pragma once

#include <string>

#include "runtime/entry.h"

namespace ridgeline {

using CompileFunction = int (*)(const char* name, const char* arch, const char* key);
using TagFunction = const char* (*)();

void set_compiler(CompileFunction compile, TagFunction tag);
void supply_entry(std::string bytes);
void supply_error(std::string message);

// Where a kernel would be found without compiling: "pack", "cache" or "".
std::string find_source(const std::string& name, const std::string& arch);

// Throws std::runtime_error with the way out when no source has the kernel.
Entry resolve(const std::string& name, const std::string& arch);

}  // namespace ridgeline
