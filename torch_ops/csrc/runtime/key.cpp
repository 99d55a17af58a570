#include "runtime/key.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string_view>

#include "runtime/paths.h"
#include "runtime/sha256.h"

namespace ridgeline {
namespace {

// Appends path and content of `path` and of all it includes with quotes, each file once.
void append_closure(const std::string& path, std::set<std::string>& seen, std::string& closure) {
  if (!seen.insert(path).second) return;
  const auto content = read_file(kernels_dir() + "/" + path);
  if (!content) {
    throw std::runtime_error("kernel source '" + path + "' is not in '" + kernels_dir() +
                             "'; reinstall ridgeline, or set RIDGELINE_KERNELS_DIR");
  }
  closure += path + '\0' + *content + '\0';
  std::string_view rest = *content;
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    const size_t hash = line.find_first_not_of(" \t");
    if (hash == line.npos || line[hash] != '#') continue;
    const size_t word = line.find_first_not_of(" \t", hash + 1);
    if (word == line.npos || line.substr(word, 7) != "include") continue;
    const size_t open = line.find('"', word);
    if (open == line.npos) continue;
    const size_t close = line.find('"', open + 1);
    if (close == line.npos) continue;
    append_closure(std::string(line.substr(open + 1, close - open - 1)), seen, closure);
  }
}

const std::string& closure_of(const std::string& header) {
  static std::mutex mutex;
  static std::map<std::string, std::string> closures;
  const std::lock_guard lock(mutex);
  auto it = closures.find(header);
  if (it == closures.end()) {
    std::string closure;
    std::set<std::string> seen;
    append_closure(header, seen, closure);
    it = closures.emplace(header, std::move(closure)).first;
  }
  return it->second;
}

}  // namespace

std::string entry_key(const std::string& name, const std::string& arch) {
  const size_t colon = name.find(':');
  if (colon == std::string::npos) {
    throw std::runtime_error("kernel name '" + name + "': expected <header>:<template-id>");
  }
  const std::string zero(1, '\0');
  Sha256 hash;
  hash.update("ridgeline-1" + zero + name + zero + arch + zero + kCompileOptions + zero);
  hash.update(closure_of(name.substr(0, colon)));
  return hex(hash.digest());
}

}  // namespace ridgeline
