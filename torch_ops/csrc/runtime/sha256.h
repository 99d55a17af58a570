// SHA-256 (FIPS 180-4), for entry keys and checksums.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ridgeline {

class Sha256 {
 public:
  Sha256();
  void update(std::string_view bytes);
  std::array<uint8_t, 32> digest();

 private:
  void block(const uint8_t* data);

  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> buffer_;
  uint64_t total_ = 0;
};

std::array<uint8_t, 32> sha256(std::string_view bytes);
std::string hex(const std::array<uint8_t, 32>& digest);

}  // namespace ridgeline
