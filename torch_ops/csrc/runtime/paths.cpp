#include "runtime/paths.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

namespace ridgeline {
namespace {

std::string library_dir() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library_dir), &info) == 0 || !info.dli_fname)
    return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

bool is_directory(const std::string& path) {
  return access((path + "/.").c_str(), F_OK) == 0;
}

std::string find_kernels() {
  if (const char* given = std::getenv("RIDGELINE_KERNELS_DIR")) return given;
  const std::string beside = library_dir() + "/kernels";
  if (is_directory(beside)) return beside;
  const std::string checkout = library_dir() + "/../kernels";
  return is_directory(checkout) ? checkout : "";
}

std::string find_packs() {
  if (const char* given = std::getenv("RIDGELINE_PACK_DIR")) return given;
  const std::string beside = library_dir() + "/packs";
  return is_directory(beside) ? beside : "";
}

std::string find_cache() {
  if (const char* given = std::getenv("RIDGELINE_CACHE_DIR")) return given;
  if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg && *xdg == '/') {
    return std::string(xdg) + "/ridgeline";
  }
  if (const char* home = std::getenv("HOME"); home && *home == '/') {
    return std::string(home) + "/.cache/ridgeline";
  }
  return "";
}

}  // namespace

const std::string& kernels_dir() {
  static const std::string path = find_kernels();
  return path;
}

const std::string& pack_dir() {
  static const std::string path = find_packs();
  return path;
}

const std::string& cache_dir() {
  static const std::string path = find_cache();
  return path;
}

std::optional<std::string> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return std::nullopt;
  const std::streamoff size = file.tellg();
  if (size < 0) return std::nullopt;  // a folder, say
  std::string contents(static_cast<size_t>(size), '\0');
  file.seekg(0);
  if (!file.read(contents.data(), size)) return std::nullopt;
  return contents;
}

}  // namespace ridgeline
