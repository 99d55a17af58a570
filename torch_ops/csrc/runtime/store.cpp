#include "runtime/store.h"

#include <dirent.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "runtime/key.h"
#include "runtime/paths.h"
#include "runtime/sha256.h"

namespace ridgeline {
namespace {

constexpr std::string_view kPackMagic = "RLPACK01";
constexpr size_t kPackPrefix = 44;  // magic, index size, checksum of the index

struct Slot {
  uint64_t offset;
  uint64_t size;
};

struct Pack {
  std::string path;
  std::map<std::string, Slot> slots;  // by key
};

[[noreturn]] void damaged_pack(const std::string& path, const std::string& what) {
  throw std::runtime_error("kernel pack '" + path + "' is damaged (" + what +
                           "): reinstall ridgeline, or set RIDGELINE_PACK_DIR= (empty) to compile "
                           "kernels on first use instead");
}

std::string read_range(std::ifstream& file, uint64_t offset, uint64_t size) {
  std::string bytes(size, '\0');
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(bytes.data(), static_cast<std::streamsize>(size));
  bytes.resize(static_cast<size_t>(file.gcount()));
  return bytes;
}

Pack open_pack(const std::string& path, std::ifstream& file) {
  const std::string prefix = read_range(file, 0, kPackPrefix);
  if (prefix.size() != kPackPrefix || std::string_view(prefix).substr(0, 8) != kPackMagic) {
    damaged_pack(path, "wrong magic number");
  }
  uint32_t index_size;
  std::memcpy(&index_size, prefix.data() + 8, sizeof(index_size));
  constexpr uint32_t kMaxIndex = 64u << 20;
  const std::string index =
      index_size <= kMaxIndex ? read_range(file, kPackPrefix, index_size) : std::string();
  const auto digest = sha256(index);
  if (index.size() != index_size || std::memcmp(digest.data(), prefix.data() + 12, 32) != 0) {
    damaged_pack(path, "checksum of the index");
  }
  Pack pack{path, {}};
  std::istringstream lines(index);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string key;
    Slot slot{};
    if (!(fields >> key >> slot.offset >> slot.size)) damaged_pack(path, "a line of the index");
    pack.slots.emplace(key, slot);
  }
  return pack;
}

// The pack of an architecture; null when there is none. Read once a process.
std::shared_ptr<const Pack> pack_of(const std::string& arch) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<const Pack>> packs;
  if (pack_dir().empty()) return nullptr;
  const std::lock_guard lock(mutex);
  const auto it = packs.find(arch);
  if (it != packs.end()) return it->second;
  const std::string path = pack_dir() + "/" + arch + ".rlpack";
  std::ifstream file(path, std::ios::binary);
  const auto pack = file ? std::make_shared<const Pack>(open_pack(path, file)) : nullptr;
  packs.emplace(arch, pack);
  return pack;
}

std::vector<std::string> cache_files(const std::string& folder, const std::string& key) {
  std::vector<std::string> files;
  DIR* dir = opendir(folder.c_str());
  if (!dir) return files;
  while (const dirent* item = readdir(dir)) {
    const std::string_view file = item->d_name;
    if (file.starts_with(key + "-") && file.ends_with(".rlk")) files.emplace_back(file);
  }
  closedir(dir);
  return files;
}

}  // namespace

std::string pack_for(const std::string& arch) {
  if (pack_of(arch)) return arch;
  if (!arch.starts_with("sm_") || arch.ends_with('a')) return "";
  const int sm = std::stoi(arch.substr(3));
  for (int lower = sm - 1; lower >= sm / 10 * 10; --lower) {
    const std::string candidate = "sm_" + std::to_string(lower);
    if (pack_of(candidate)) return candidate;
  }
  return "";
}

std::optional<Entry> find_in_pack(const std::string& name, const std::string& arch) {
  const std::string served_by = pack_for(arch);
  if (served_by.empty()) return std::nullopt;
  const auto pack = pack_of(served_by);
  const auto slot = pack->slots.find(entry_key(name, served_by));
  if (slot == pack->slots.end()) return std::nullopt;
  std::ifstream file(pack->path, std::ios::binary);
  try {
    return parse_entry(read_range(file, slot->second.offset, slot->second.size));
  } catch (const std::exception& error) {
    damaged_pack(pack->path, "kernel " + name + ": " + error.what());
  }
}

std::optional<Entry> find_in_cache(const std::string& name, const std::string& arch,
                                   const std::string& tag, std::string* damaged) {
  if (cache_dir().empty()) return std::nullopt;
  const std::string folder = cache_dir() + "/" + arch;
  const std::string key = entry_key(name, arch);
  const auto files =
      tag.empty() ? cache_files(folder, key) : std::vector<std::string>{key + "-" + tag + ".rlk"};
  for (const std::string& file : files) {
    const std::string path = folder + "/" + file;
    const auto bytes = read_file(path);
    if (!bytes) continue;
    try {
      Entry entry = parse_entry(*bytes);
      if (entry.key == key) return entry;
      throw std::runtime_error("it holds another kernel");
    } catch (const std::exception& error) {
      *damaged = path + " (" + error.what() + ")";
    }
  }
  return std::nullopt;
}

}  // namespace ridgeline
