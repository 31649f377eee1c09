// How matrices come: rows of numbers or of ggml's blocks (ggml-common.h), and what one group of 32 numbers holds.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace octavo {

constexpr int kGroup = 32;  // numbers that share a scale

// ggml's numbers of the types that are taken as they are; all others come dequantised.
enum class Stored : int32_t { kF32 = 0, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kBF16 = 30 };

// How a matrix is kept. Quantised numbers are unsigned: value = scale * (q - kOffset) + minimum.
enum class Form : int32_t { kFloat32, kBFloat16, kInt4, kInt4Min, kInt8, kInt8Min };

inline bool form_of(Stored stored, Form& form) {
  switch (stored) {
    case Stored::kF32: form = Form::kFloat32; return true;
    case Stored::kBF16: form = Form::kBFloat16; return true;
    case Stored::kQ4_0: form = Form::kInt4; return true;
    case Stored::kQ4_1: form = Form::kInt4Min; return true;
    case Stored::kQ5_0: form = Form::kInt8; return true;
    case Stored::kQ5_1: form = Form::kInt8Min; return true;
    case Stored::kQ8_0: form = Form::kInt8; return true;
  }
  return false;
}

inline bool is_quantised(Form form) { return form != Form::kFloat32 && form != Form::kBFloat16; }
inline bool is_4_bit(Form form) { return form == Form::kInt4 || form == Form::kInt4Min; }
inline bool has_minimum(Form form) { return form == Form::kInt4Min || form == Form::kInt8Min; }

// What is taken off a stored number; symmetric types are shifted so that they are unsigned.
constexpr int offset_of(Form form) { return form == Form::kInt4 ? 8 : form == Form::kInt8 ? 128 : 0; }

inline int64_t stored_row_bytes(Stored stored, int64_t columns) {
  switch (stored) {
    case Stored::kF32: return columns * 4;
    case Stored::kBF16: return columns * 2;
    case Stored::kQ4_0: return columns / kGroup * 18;
    case Stored::kQ4_1: return columns / kGroup * 20;
    case Stored::kQ5_0: return columns / kGroup * 22;
    case Stored::kQ5_1: return columns / kGroup * 24;
    case Stored::kQ8_0: return columns / kGroup * 34;
  }
  return 0;
}

// One group as the file has it.
struct Group {
  uint16_t scale;    // float16
  uint16_t minimum;  // float16
  uint8_t q[kGroup];  // two 4-bit numbers a byte in the first 16 for 4-bit forms: number i low, number i + 16 high
};

inline void read_fifth_bits(const uint8_t* bits, const uint8_t* nibbles, uint8_t* q) {
  uint32_t high;
  std::memcpy(&high, bits, 4);
  for (int i = 0; i < 16; i++) {
    q[i] = (uint8_t)((nibbles[i] & 15) | ((high >> i & 1) << 4));
    q[i + 16] = (uint8_t)((nibbles[i] >> 4) | ((high >> (i + 16) & 1) << 4));
  }
}

inline Group read_group(Stored stored, const uint8_t* row, int64_t index) {
  Group group{};
  const uint8_t* block = row + index * stored_row_bytes(stored, kGroup);
  std::memcpy(&group.scale, block, 2);
  switch (stored) {
    case Stored::kQ4_0: std::memcpy(group.q, block + 2, 16); break;
    case Stored::kQ4_1:
      std::memcpy(&group.minimum, block + 2, 2);
      std::memcpy(group.q, block + 4, 16);
      break;
    case Stored::kQ5_0:
      read_fifth_bits(block + 2, block + 6, group.q);
      for (uint8_t& q : group.q) q = (uint8_t)(q + offset_of(Form::kInt8) - 16);
      break;
    case Stored::kQ5_1:
      std::memcpy(&group.minimum, block + 2, 2);
      read_fifth_bits(block + 4, block + 8, group.q);
      break;
    case Stored::kQ8_0:
      for (int i = 0; i < kGroup; i++) group.q[i] = (uint8_t)(block[2 + i] ^ 0x80);
      break;
    default: break;  // not in groups
  }
  return group;
}

}  // namespace octavo
