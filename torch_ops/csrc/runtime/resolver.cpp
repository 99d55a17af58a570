#include "runtime/resolver.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "runtime/key.h"
#include "runtime/paths.h"
#include "runtime/store.h"

namespace ridgeline {
namespace {

std::atomic<CompileFunction> compile_function{nullptr};
std::atomic<TagFunction> tag_function{nullptr};
thread_local std::string supplied_entry;
thread_local std::string supplied_error;

std::string compiler_tag() {
  const TagFunction tag = tag_function.load();
  return tag ? tag() : "";
}

bool compiling_is_forbidden() {
  const char* jit = std::getenv("RIDGELINE_JIT");
  return jit && std::string_view(jit) == "0";
}

[[noreturn]] void missing(const std::string& name, const std::string& arch, const std::string& why,
                          const std::string& way_out) {
  const auto shown = [](const std::string& dir) { return dir.empty() ? "none" : "'" + dir + "'"; };
  throw std::runtime_error("kernel " + name + " for " + arch + " is neither in a pack (folder " +
                           shown(pack_dir()) + ") nor in the disk cache (" + shown(cache_dir()) +
                           "), and " + why + ". " + way_out);
}

}  // namespace

void set_compiler(CompileFunction compile, TagFunction tag) {
  compile_function.store(compile);
  tag_function.store(tag);
}

void supply_entry(std::string bytes) {
  supplied_entry = std::move(bytes);
}
void supply_error(std::string message) {
  supplied_error = std::move(message);
}

std::string find_source(const std::string& name, const std::string& arch) {
  if (find_in_pack(name, arch)) return "pack";
  std::string damaged;
  return find_in_cache(name, arch, compiler_tag(), &damaged) ? "cache" : "";
}

Entry resolve(const std::string& name, const std::string& arch) {
  if (auto entry = find_in_pack(name, arch)) return *std::move(entry);
  std::string damaged;
  if (auto entry = find_in_cache(name, arch, compiler_tag(), &damaged)) return *std::move(entry);

  const std::string note = damaged.empty() ? "" : "; the cache entry is damaged: " + damaged;
  if (compiling_is_forbidden()) {
    missing(name, arch, "RIDGELINE_JIT=0 forbids compiling it" + note,
            "Unset RIDGELINE_JIT, or run `python -m ridgeline warmup` where compiling is allowed, "
            "or install a wheel whose packs serve this GPU.");
  }
  const CompileFunction compile = compile_function.load();
  if (!compile) {
    missing(name, arch, "this process has no compiler (it runs without Python)" + note,
            "Run `python -m ridgeline warmup` on this machine first.");
  }
  supplied_entry.clear();
  supplied_error.clear();
  if (compile(name.c_str(), arch.c_str(), entry_key(name, arch).c_str()) != 0) {
    throw std::runtime_error(supplied_error.empty() ? "compiling " + name + " failed"
                                                    : supplied_error);
  }
  return parse_entry(supplied_entry);
}

}  // namespace ridgeline
