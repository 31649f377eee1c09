// The inner loops of matrix products. Included by matrix.h alone, which says how the weights lie.
//
// A kernel computes kRows rows by kTiles tiles in registers. All its variants add up in the same order.
#pragma once

namespace octavo {

// The sums over a group of one tile and one row, in integers.
#if defined(OCTAVO_EMULATE_512) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <bool k4Bit>
struct GroupSum {
  Ints total{};
  void add(Bytes weights, Bytes x) { total = dot_bytes(total, weights, x); }
  Ints sum() const { return total; }
};
#else
// Sums of byte products are 16 bits wide here, so weights are taken in halves of 4 bits.
inline void add_products(Shorts& sum, Bytes weights, Bytes x) {
  sum += dot_byte_pairs(weights, x);
  // Sums of integers may be reordered, and GCC computes all products of a group first: more than there are registers.
  asm("" : "+x"(sum));
}
template <bool k4Bit>
struct GroupSum {
  Shorts low{};
  void add(Bytes weights, Bytes x) { add_products(low, weights, x); }
  Ints sum() const { return add_pairs(low, 1); }
};
template <>
struct GroupSum<false> {
  Shorts low{}, high{};
  void add_halves(Bytes weights_low, Bytes weights_high, Bytes x) {
    add_products(low, weights_low, x);
    add_products(high, weights_high, x);
  }
  Ints sum() const { return add_pairs(low, 1) + add_pairs(high, 16); }
};
#endif

inline Bytes low_nibbles(Bytes bytes) { return bytes & (uint8_t)15; }
inline Bytes high_nibbles(Bytes bytes) { return (Bytes)((Shorts)bytes >> 4) & (uint8_t)15; }

template <Form kForm, int kRows>
inline void multiply_quantised(const uint8_t* tile, const Activations& x, int64_t row, float* out) {
  constexpr bool k4Bit = kForm == Form::kInt4 || kForm == Form::kInt4Min;
  constexpr bool kMinimum = kForm == Form::kInt4Min || kForm == Form::kInt8Min;
  constexpr int kOffset = offset_of(kForm);
  constexpr int kVector = kLanes * 4;
  const int64_t groups = x.groups(), inputs = x.inputs;
  const int8_t* numbers = x.int8 + row * inputs;
  const float* scales = x.scales + row * groups;
  const float* scaled_sums = x.scaled_sums + row * groups;
  const int32_t* sums = x.sums + row * groups;
  Floats total[kRows] = {};
  for (int64_t g = 0; g < groups; g++, numbers += kGroup) {
    GroupSum<k4Bit> group[kRows];
    if constexpr (k4Bit) {
      for (int j = 0; j < 4; j++, tile += kVector) {
        const Bytes packed = load<Bytes>(tile);
        const Bytes low = low_nibbles(packed), high = high_nibbles(packed);
        for (int r = 0; r < kRows; r++) group[r].add(low, broadcast_4_bytes(numbers + r * inputs + 4 * j));
        for (int r = 0; r < kRows; r++) group[r].add(high, broadcast_4_bytes(numbers + r * inputs + 16 + 4 * j));
      }
    } else {
      for (int j = 0; j < 8; j++, tile += kVector) {
        const Bytes packed = load<Bytes>(tile);
        if constexpr (kHasVnni) {
          for (int r = 0; r < kRows; r++) group[r].add(packed, broadcast_4_bytes(numbers + r * inputs + 4 * j));
        } else {
          const Bytes low = low_nibbles(packed), high = high_nibbles(packed);
          for (int r = 0; r < kRows; r++)
            group[r].add_halves(low, high, broadcast_4_bytes(numbers + r * inputs + 4 * j));
        }
      }
    }
    const Floats scale = load_half((const uint16_t*)tile);
    tile += kLanes * 2;
    Floats minimum{};
    if constexpr (kMinimum) {
      minimum = load_half((const uint16_t*)tile);
      tile += kLanes * 2;
    }
    for (int r = 0; r < kRows; r++) {
      Ints sum = group[r].sum();
      if constexpr (kOffset != 0) sum -= kOffset * sums[r * groups + g];
      total[r] = multiply_add(to_floats(sum), scale * scales[r * groups + g], total[r]);
      if constexpr (kMinimum) total[r] = multiply_add(minimum, broadcast(scaled_sums[r * groups + g]), total[r]);
    }
  }
  for (int r = 0; r < kRows; r++) store(out + r * kBlock, total[r]);
}

template <int kRows, int kTiles>
inline void multiply_float32(const uint8_t* tile, int64_t tile_bytes, const Activations& x, int64_t row,
                             int64_t inputs, float* out) {
  const float* numbers = x.floats + row * x.inputs;
  Floats total[kRows][kTiles] = {};
  for (int64_t i = 0; i < inputs; i++, tile += kLanes * 4) {
    Floats weights[kTiles];
    for (int t = 0; t < kTiles; t++) weights[t] = load<Floats>(tile + t * tile_bytes);
    for (int r = 0; r < kRows; r++) {
      const Floats number = broadcast(numbers[r * x.inputs + i]);
      for (int t = 0; t < kTiles; t++) total[r][t] = multiply_add(number, weights[t], total[r][t]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < kTiles; t++) store(out + r * kBlock + t * kLanes, total[r][t]);
}

// Without bfloat16 instructions the activations are float32, rounded to bfloat16 before.
template <int kRows, int kTiles>
inline void multiply_bfloat16(const uint8_t* tile, int64_t tile_bytes, const Activations& x, int64_t row,
                              int64_t inputs, float* out) {
  Floats total[kRows][kTiles] = {};
  for (int64_t i = 0; i < inputs; i += 2, tile += kLanes * 4) {
    Ints weights[kTiles];
    for (int t = 0; t < kTiles; t++) weights[t] = load<Ints>(tile + t * tile_bytes);
    for (int r = 0; r < kRows; r++) {
#if defined(OCTAVO_EMULATE_512) || defined(__AVX512BF16__)
      const Ints pair = (Ints)broadcast_4_bytes(x.bf16 + (row + r) * x.inputs + i);
      for (int t = 0; t < kTiles; t++) total[r][t] = dot_bf16(total[r][t], weights[t], pair);
#else
      const float* numbers = x.floats + (row + r) * x.inputs + i;
      const Floats first = broadcast(numbers[0]), second = broadcast(numbers[1]);
      const Ints high = broadcast((int32_t)0xffff0000);
      for (int t = 0; t < kTiles; t++) {
        total[r][t] = multiply_add(first, (Floats)(weights[t] << 16), total[r][t]);
        total[r][t] = multiply_add(second, (Floats)(weights[t] & high), total[r][t]);
      }
#endif
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < kTiles; t++) store(out + r * kBlock + t * kLanes, total[r][t]);
}

// Rows in registers at a time; the rest goes through the smaller variants.
constexpr int kQuantisedRows = kLanes == 16 ? 8 : 4;
constexpr int kFloatRows = kLanes == 16 ? 8 : 4;
constexpr int kFloatTiles = 2;

template <Form kForm, int kRows>
void quantised_block(const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t row, int num_rows,
                     float* out) {
  int done = 0;
  for (; done + kRows <= num_rows; done += kRows)
    for (int t = 0; t < kTilesInBlock; t++)
      multiply_quantised<kForm, kRows>(tiles + t * tile_bytes, x, row + done, out + done * kBlock + t * kLanes);
  if constexpr (kRows > 1) {
    if (done < num_rows)
      quantised_block<kForm, kRows / 2>(tiles, tile_bytes, x, row + done, num_rows - done, out + done * kBlock);
  }
}

template <bool kBf16, int kRows>
void float_block(const uint8_t* tiles, int64_t tile_bytes, const Activations& x, int64_t row, int num_rows,
                 int64_t inputs, float* out) {
  int done = 0;
  for (; done + kRows <= num_rows; done += kRows)
    for (int t = 0; t < kTilesInBlock; t += kFloatTiles) {
      const uint8_t* tile = tiles + t * tile_bytes;
      float* to = out + done * kBlock + t * kLanes;
      if constexpr (kBf16)
        multiply_bfloat16<kRows, kFloatTiles>(tile, tile_bytes, x, row + done, inputs, to);
      else
        multiply_float32<kRows, kFloatTiles>(tile, tile_bytes, x, row + done, inputs, to);
    }
  if constexpr (kRows > 1) {
    if (done < num_rows)
      float_block<kBf16, kRows / 2>(tiles, tile_bytes, x, row + done, num_rows - done, inputs, out + done * kBlock);
  }
}

inline void Matrix::multiply_block(int block, const Activations& x, int64_t row, int num_rows, float* out) const {
  const uint8_t* tiles = memory_.as<uint8_t>() + block * kTilesInBlock * tile_bytes_;
  switch (form_) {
    case Form::kFloat32: return float_block<false, kFloatRows>(tiles, tile_bytes_, x, row, num_rows, inputs_, out);
    case Form::kBFloat16: return float_block<true, kFloatRows>(tiles, tile_bytes_, x, row, num_rows, inputs_, out);
    case Form::kInt4: return quantised_block<Form::kInt4, kQuantisedRows>(tiles, tile_bytes_, x, row, num_rows, out);
    case Form::kInt4Min:
      return quantised_block<Form::kInt4Min, kQuantisedRows>(tiles, tile_bytes_, x, row, num_rows, out);
    case Form::kInt8: return quantised_block<Form::kInt8, kQuantisedRows>(tiles, tile_bytes_, x, row, num_rows, out);
    case Form::kInt8Min:
      return quantised_block<Form::kInt8Min, kQuantisedRows>(tiles, tile_bytes_, x, row, num_rows, out);
  }
}

}  // namespace octavo
