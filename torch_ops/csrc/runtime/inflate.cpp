#include "runtime/inflate.h"

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ridgeline {
namespace {

[[noreturn]] void malformed(const char* what) {
  throw std::runtime_error(std::string("malformed deflate data: ") + what);
}

class BitReader {
 public:
  explicit BitReader(std::string_view bytes) : bytes_(bytes) {}

  uint32_t bits(int count) {
    while (held_ < count) {
      if (position_ == bytes_.size()) malformed("ends early");
      buffer_ |= uint64_t{static_cast<uint8_t>(bytes_[position_++])} << held_;
      held_ += 8;
    }
    const uint32_t value = static_cast<uint32_t>(buffer_ & ((uint64_t{1} << count) - 1));
    buffer_ >>= count;
    held_ -= count;
    return value;
  }

  void align_to_byte() {
    buffer_ >>= held_ % 8;
    held_ -= held_ % 8;
  }

 private:
  std::string_view bytes_;
  size_t position_ = 0;
  uint64_t buffer_ = 0;
  int held_ = 0;
};

// A canonical Huffman code: symbols sorted by code length, decoded a bit at a time.
class Huffman {
 public:
  explicit Huffman(const std::vector<uint8_t>& lengths) {
    for (const uint8_t length : lengths) ++count_[length];
    count_[0] = 0;
    std::array<int, 17> offset{};
    int space = 1;
    for (int length = 1; length <= 15; ++length) {
      space = 2 * space - count_[length];
      if (space < 0) malformed("over-subscribed code");
      offset[length + 1] = offset[length] + count_[length];
    }
    symbols_.resize(lengths.size());
    for (size_t symbol = 0; symbol < lengths.size(); ++symbol) {
      if (lengths[symbol] != 0) symbols_[offset[lengths[symbol]]++] = static_cast<uint16_t>(symbol);
    }
  }

  int decode(BitReader& in) const {
    int code = 0, first = 0, index = 0;
    for (int length = 1; length <= 15; ++length) {
      code |= static_cast<int>(in.bits(1));
      const int count = count_[length];
      if (code - first < count) return symbols_[index + code - first];
      index += count;
      first = (first + count) << 1;
      code <<= 1;
    }
    malformed("invalid code");
  }

 private:
  std::array<int, 17> count_{};
  std::vector<uint16_t> symbols_;
};

constexpr std::array<uint16_t, 29> kLengthBase = {3,  4,  5,  6,   7,   8,   9,   10,  11, 13,
                                                  15, 17, 19, 23,  27,  31,  35,  43,  51, 59,
                                                  67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr std::array<uint8_t, 29> kLengthExtra = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                                  2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr std::array<uint16_t, 30> kDistanceBase = {
    1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
    193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr std::array<uint8_t, 30> kDistanceExtra = {0, 0, 0,  0,  1,  1,  2,  2,  3,  3,
                                                    4, 4, 5,  5,  6,  6,  7,  7,  8,  8,
                                                    9, 9, 10, 10, 11, 11, 12, 12, 13, 13};

void stored_block(BitReader& in, std::string& out, size_t raw_size) {
  in.align_to_byte();
  const uint32_t size = in.bits(16);
  if (size != (in.bits(16) ^ 0xffffu)) malformed("stored block length");
  if (out.size() + size > raw_size) malformed("too long");
  for (uint32_t i = 0; i < size; ++i) out += static_cast<char>(in.bits(8));
}

void coded_block(BitReader& in, const Huffman& literals, const Huffman& distances, std::string& out,
                 size_t raw_size) {
  for (;;) {
    const int symbol = literals.decode(in);
    if (symbol == 256) return;
    if (symbol < 256) {
      if (out.size() == raw_size) malformed("too long");
      out += static_cast<char>(symbol);
      continue;
    }
    if (symbol > 285) malformed("length symbol");
    const size_t length = kLengthBase[symbol - 257] + in.bits(kLengthExtra[symbol - 257]);
    const int distance_symbol = distances.decode(in);
    if (distance_symbol > 29) malformed("distance symbol");
    const size_t distance =
        kDistanceBase[distance_symbol] + in.bits(kDistanceExtra[distance_symbol]);
    if (distance > out.size()) malformed("distance before the start");
    if (out.size() + length > raw_size) malformed("too long");
    for (size_t i = 0; i < length; ++i) out += out[out.size() - distance];
  }
}

void dynamic_block(BitReader& in, std::string& out, size_t raw_size) {
  const int num_literals = static_cast<int>(in.bits(5)) + 257;
  const int num_distances = static_cast<int>(in.bits(5)) + 1;
  const int num_code_lengths = static_cast<int>(in.bits(4)) + 4;
  constexpr std::array<uint8_t, 19> kOrder = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                              11, 4,  12, 3, 13, 2, 14, 1, 15};
  std::vector<uint8_t> code_lengths(19, 0);
  for (int i = 0; i < num_code_lengths; ++i) {
    code_lengths[kOrder[i]] = static_cast<uint8_t>(in.bits(3));
  }
  const Huffman length_code(code_lengths);
  std::vector<uint8_t> lengths;
  const size_t total = static_cast<size_t>(num_literals + num_distances);
  while (lengths.size() < total) {
    const int symbol = length_code.decode(in);
    if (symbol < 16) {
      lengths.push_back(static_cast<uint8_t>(symbol));
      continue;
    }
    if (symbol == 16 && lengths.empty()) malformed("repeat of nothing");
    const uint8_t value = symbol == 16 ? lengths.back() : uint8_t{0};
    const uint32_t repeat = symbol == 16   ? 3 + in.bits(2)
                            : symbol == 17 ? 3 + in.bits(3)
                                           : 11 + in.bits(7);
    lengths.insert(lengths.end(), repeat, value);
  }
  if (lengths.size() > total) malformed("too many code lengths");
  const Huffman literals({lengths.begin(), lengths.begin() + num_literals});
  const Huffman distances({lengths.begin() + num_literals, lengths.end()});
  coded_block(in, literals, distances, out, raw_size);
}

void fixed_block(BitReader& in, std::string& out, size_t raw_size) {
  std::vector<uint8_t> lengths(288, 8);
  for (int i = 144; i < 256; ++i) lengths[i] = 9;
  for (int i = 256; i < 280; ++i) lengths[i] = 7;
  coded_block(in, Huffman(lengths), Huffman(std::vector<uint8_t>(30, 5)), out, raw_size);
}

}  // namespace

std::string inflate(std::string_view deflated, size_t raw_size) {
  BitReader in(deflated);
  std::string out;
  out.reserve(raw_size);
  for (bool last = false; !last;) {
    last = in.bits(1) != 0;
    switch (in.bits(2)) {
      case 0:
        stored_block(in, out, raw_size);
        break;
      case 1:
        fixed_block(in, out, raw_size);
        break;
      case 2:
        dynamic_block(in, out, raw_size);
        break;
      default:
        malformed("block type");
    }
  }
  if (out.size() != raw_size) malformed("too short");
  return out;
}

}  // namespace ridgeline
