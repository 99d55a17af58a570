#include "runtime/entry.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>

#include "runtime/inflate.h"
#include "runtime/sha256.h"

namespace ridgeline {
namespace {

constexpr std::string_view kMagic = "RLKERN01";
constexpr size_t kPrefixSize = 48;  // magic, two sizes, checksum
constexpr size_t kMaxRawSize = size_t{1} << 30;

uint32_t load_u32(std::string_view bytes, size_t offset) {
  uint32_t value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

std::map<std::string, std::string, std::less<>> parse_header(std::string_view header) {
  std::map<std::string, std::string, std::less<>> fields;
  while (!header.empty()) {
    const std::string_view line = header.substr(0, header.find('\n'));
    const size_t equals = line.find('=');
    if (equals == line.npos) throw std::runtime_error("a header line has no '='");
    fields.emplace(line.substr(0, equals), line.substr(equals + 1));
    header.remove_prefix(std::min(header.size(), line.size() + 1));
  }
  return fields;
}

}  // namespace

Entry parse_entry(std::string_view bytes) {
  if (bytes.size() < kPrefixSize || bytes.substr(0, 8) != kMagic) {
    throw std::runtime_error("not a kernel entry (wrong magic number)");
  }
  const size_t header_size = load_u32(bytes, 8);
  const size_t payload_size = load_u32(bytes, 12);
  if (bytes.size() != kPrefixSize + header_size + payload_size) {
    throw std::runtime_error("truncated: " + std::to_string(bytes.size()) + " bytes, expected " +
                             std::to_string(kPrefixSize + header_size + payload_size));
  }
  const auto digest = sha256(bytes.substr(kPrefixSize));
  if (std::memcmp(digest.data(), bytes.data() + 16, digest.size()) != 0) {
    throw std::runtime_error("checksum mismatch");
  }
  const auto fields = parse_header(bytes.substr(kPrefixSize, header_size));
  const auto field = [&](std::string_view name) -> const std::string& {
    const auto it = fields.find(name);
    if (it == fields.end()) throw std::runtime_error("no field '" + std::string(name) + "'");
    return it->second;
  };
  const size_t raw_size = std::stoull(field("raw_size"));
  if (raw_size > kMaxRawSize) throw std::runtime_error("raw_size is out of range");
  Entry entry{field("name"), field("arch"), field("kind"), field("lowered"), field("key"), {}};
  entry.code = inflate(bytes.substr(kPrefixSize + header_size), raw_size);
  return entry;
}

}  // namespace ridgeline
