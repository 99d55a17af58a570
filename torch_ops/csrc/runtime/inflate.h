// Raw deflate decoding (RFC 1951), so that packs are read without zlib and without Python.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace ridgeline {

// Decodes exactly `raw_size` bytes. Throws std::runtime_error on malformed input or another size.
std::string inflate(std::string_view deflated, size_t raw_size);

}  // namespace ridgeline
