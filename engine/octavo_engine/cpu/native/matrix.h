// Weight matrices, packed for the processor, and their product with rows of activations.
//
// A matrix [outputs, inputs] is kept in tiles of kLanes outputs. Within a tile the numbers of all outputs for the same
// few inputs stand together, so that one vector load serves a vector of outputs and nothing is ever summed across
// lanes. Each output is one chain of sums over the inputs from first to last, whatever the number of rows: a row's result
// does not depend on the rows beside it.
//
//   float32   per input: kLanes floats
//   bfloat16  per two inputs: kLanes pairs
//   int4      per group of 32 inputs: 4 vectors of kLanes * 4 bytes: byte i of lane c in vector j has input 4 j + i in its low
//             half and 16 + 4 j + i in its high one (ggml's own order); then kLanes float16 scales [and minima]
//   int8      the same with 8 vectors: input 4 j + i
//
// Quantised weights multiply int8 activations with one scale for 32, exactly in integers within a group:
//   sum_i (s (q_i - offset) + m) * t x_i  =  s t (sum_i q_i x_i - offset sum_i x_i) + m t sum_i x_i
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "formats.h"
#include "isa.h"

namespace octavo {

constexpr int kBlock = 32;                     // outputs that are computed at a time: one group of the next matrix
constexpr int kTilesInBlock = kBlock / kLanes;

// Memory in huge pages where the system has them, aligned to cache lines, zero at first.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    if (bytes >= (4u << 20)) madvise(data_, bytes, MADV_HUGEPAGE);
  }
  ~Memory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Activations in the forms that matrices multiply: float32 [rows, inputs], bfloat16 pairs, or int8 with scales.
struct Activations {
  int64_t inputs = 0;  // padded to whole groups; what is beyond is zero
  float* floats = nullptr;
  uint16_t* bf16 = nullptr;
  int8_t* int8 = nullptr;
  float* scales = nullptr;       // of int8 [rows, inputs / 32]
  float* scaled_sums = nullptr;  // scale * sum of the group's int8
  int32_t* sums = nullptr;       // sum of the group's int8

  int64_t groups() const { return inputs / kGroup; }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Matrix {
 public:
  Matrix() = default;

  // Reserves; `pack_block` fills.
  Matrix(Form form, int64_t outputs, int64_t inputs)
      : form_(form), outputs_(outputs), inputs_(inputs), tile_bytes_(tile_bytes(form, inputs)) {
    memory_ = Memory((size_t)(num_blocks() * kTilesInBlock * tile_bytes_));
  }

  Form form() const { return form_; }
  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  int num_blocks() const { return (int)((outputs_ + kBlock - 1) / kBlock); }
  size_t bytes() const { return memory_.bytes(); }
  bool empty() const { return outputs_ == 0; }

  // Packs the 32 outputs of a block from stored rows; safe for different blocks at the same time.
  void pack_block(int block, Stored stored, const uint8_t* rows, int64_t row_bytes) {
    for (int64_t output = (int64_t)block * kBlock; output < std::min<int64_t>(outputs_, (int64_t)(block + 1) * kBlock);
         output++) {
      uint8_t* tile = memory_.as<uint8_t>() + output / kLanes * tile_bytes_;
      pack_output(tile, (int)(output % kLanes), stored, rows + output * row_bytes);
    }
  }

  // One row of the matrix as float32 [inputs]: embeddings are looked up in the packed form.
  void unpack_output(int64_t output, float* out) const {
    const uint8_t* tile = memory_.as<uint8_t>() + output / kLanes * tile_bytes_;
    const int lane = (int)(output % kLanes);
    if (form_ == Form::kFloat32) {
      for (int64_t i = 0; i < inputs_; i++) std::memcpy(out + i, tile + (i * kLanes + lane) * 4, 4);
    } else if (form_ == Form::kBFloat16) {
      for (int64_t i = 0; i < inputs_; i++) {
        uint16_t value;
        std::memcpy(&value, tile + (i / 2 * kLanes + lane) * 4 + i % 2 * 2, 2);
        out[i] = bf16_to_float(value);
      }
    } else {
      unpack_groups(tile, lane, out);
    }
  }

  // out[row * kBlock + i] = output (32 block + i) of rows first_row to first_row + num_rows.
  void multiply_block(int block, const Activations& x, int64_t first_row, int num_rows, float* out) const;

  static int64_t group_bytes(Form form) {
    return kLanes * ((is_4_bit(form) ? kGroup / 2 : kGroup) + 2 + (has_minimum(form) ? 2 : 0));
  }

 private:
  static int64_t tile_bytes(Form form, int64_t inputs) {
    if (form == Form::kFloat32) return inputs * kLanes * 4;
    if (form == Form::kBFloat16) return (inputs + 1) / 2 * kLanes * 4;
    return round_up(inputs, kGroup) / kGroup * group_bytes(form);
  }

  void pack_output(uint8_t* tile, int lane, Stored stored, const uint8_t* row) {
    if (form_ == Form::kFloat32) {
      for (int64_t i = 0; i < inputs_; i++) std::memcpy(tile + (i * kLanes + lane) * 4, row + i * 4, 4);
    } else if (form_ == Form::kBFloat16) {
      for (int64_t i = 0; i < inputs_; i++)
        std::memcpy(tile + (i / 2 * kLanes + lane) * 4 + i % 2 * 2, row + i * 2, 2);
    } else {
      const int vectors = is_4_bit(form_) ? 4 : 8;
      for (int64_t g = 0; g < inputs_ / kGroup; g++) {
        const Group group = read_group(stored, row, g);
        uint8_t* to = tile + g * group_bytes(form_);
        for (int j = 0; j < vectors; j++) std::memcpy(to + (j * kLanes + lane) * 4, group.q + 4 * j, 4);
        to += vectors * kLanes * 4;
        std::memcpy(to + lane * 2, &group.scale, 2);
        if (has_minimum(form_)) std::memcpy(to + (kLanes + lane) * 2, &group.minimum, 2);
      }
    }
  }

  void unpack_groups(const uint8_t* tile, int lane, float* out) const {
    const int vectors = is_4_bit(form_) ? 4 : 8;
    for (int64_t g = 0; g < inputs_ / kGroup; g++, out += kGroup) {
      const uint8_t* from = tile + g * group_bytes(form_);
      uint16_t scale, minimum = 0;
      std::memcpy(&scale, from + vectors * kLanes * 4 + lane * 2, 2);
      if (has_minimum(form_)) std::memcpy(&minimum, from + vectors * kLanes * 4 + (kLanes + lane) * 2, 2);
      const float s = half_to_float(scale), m = half_to_float(minimum);
      for (int i = 0; i < vectors * 4; i++) {
        const uint8_t byte = from[(i / 4 * kLanes + lane) * 4 + i % 4];
        if (is_4_bit(form_)) {
          out[i] = s * (float)((byte & 15) - offset_of(form_)) + m;
          out[i + 16] = s * (float)((byte >> 4) - offset_of(form_)) + m;
        } else {
          out[i] = s * (float)(byte - offset_of(form_)) + m;
        }
      }
    }
  }

  Form form_ = Form::kFloat32;
  int64_t outputs_ = 0, inputs_ = 0, tile_bytes_ = 0;
  Memory memory_;
};

}  // namespace octavo

#include "multiply.h"
