// What is computed for one row at a time between the matrix products: norms, activation functions, rotation, rounding.
#pragma once

#include <cmath>

#include "matrix.h"

namespace octavo {

enum class Gate : int32_t { kSilu = 0, kGeluTanh = 1 };

// y = x / rms(x) * weight. Sizes that are no multiple of a vector end in a scalar loop.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    for (int j = 0; j < 2; j++) {
      const Floats v = load_floats(x + i + j * kLanes);
      sums[j] = multiply_add(v, v, sums[j]);
    }
  float sum = sum_lanes(sums[0] + sums[1]);
  for (; i < size; i++) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / (float)size + eps);
  for (i = 0; i + kLanes <= size; i += kLanes)
    store(y + i, load_floats(x + i) * scale * load_floats(weight + i));
  for (; i < size; i++) y[i] = x[i] * scale * weight[i];
}

inline float dot(const float* x, const float* y, int64_t size) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes)
    for (int j = 0; j < 2; j++)
      sums[j] = multiply_add(load_floats(x + i + j * kLanes), load_floats(y + i + j * kLanes), sums[j]);
  float sum = sum_lanes(sums[0] + sums[1]);
  for (; i < size; i++) sum += x[i] * y[i];
  return sum;
}

// y += factor * x
inline void add_multiple(float* y, float factor, const float* x, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    store(y + i, multiply_add(broadcast(factor), load_floats(x + i), load_floats(y + i)));
  for (; i < size; i++) y[i] += factor * x[i];
}

// Turns the pairs (x[d], x[d + half]) by their angles.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Floats a = load_floats(x + d), b = load_floats(x + half + d), c = load_floats(cos + d), s = load_floats(sin + d);
    store(x + d, a * c - b * s);
    store(x + half + d, b * c + a * s);
  }
  for (; d < half; d++) {
    const float a = x[d], b = x[half + d];
    x[d] = a * cos[d] - b * sin[d];
    x[half + d] = b * cos[d] + a * sin[d];
  }
}

// act(gate) * up for the 32 outputs of a block.
inline void gate_block(Gate gate, const float* gates, const float* ups, float* out) {
  for (int i = 0; i < kBlock; i += kLanes) {
    const Floats g = load_floats(gates + i), u = load_floats(ups + i);
    if (gate == Gate::kSilu) {
      store(out + i, g * sigmoid(g) * u);
    } else {  // 0.5 g (1 + tanh(y)) is g sigmoid(2 y)
      const Floats y = 0.7978845608028654f * multiply_add(0.044715f * g * g, g, g);
      store(out + i, g * sigmoid(2.0f * y) * u);
    }
  }
}

// Which forms of its input the next products need.
struct Needs {
  bool floats = false;   // as they are
  bool rounded = false;  // float32 rounded to bfloat16 (processors without bfloat16 products)
  bool bf16 = false;
  bool int8 = false;

  void add(Form form) {
    if (is_quantised(form)) int8 = true;
    if (form == Form::kFloat32) floats = true;
    if (form == Form::kBFloat16) (kHasBf16 ? bf16 : rounded) = true;
  }
};

// Rounds a group of 32 to int8 with one scale: the largest becomes 127. A NaN or infinity makes the scale NaN.
inline void quantise_group(const float* x, const Activations& to, int64_t row, int64_t group) {
  constexpr int kVectors = kGroup / kLanes;
  Floats largest{}, poison{};
  Floats v[kVectors];
  for (int j = 0; j < kVectors; j++) {
    v[j] = load_floats(x + j * kLanes);
    poison += v[j] * 0.0f;
    const Floats positive = (Floats)((Ints)v[j] & broadcast((int32_t)0x7fffffff));
    largest = positive > largest ? positive : largest;
  }
  const float peak = max_lanes(largest);
  const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
  const Floats magic = broadcast(12582912.0f);
  Ints sums{};
  int8_t* numbers = to.int8 + row * to.inputs + group * kGroup;
  for (int j = 0; j < kVectors; j++) {
    const Ints rounded = (Ints)(v[j] * inverse + magic) - (Ints)magic;
    sums += rounded;
    int32_t lanes[kLanes];
    store(lanes, rounded);
    for (int i = 0; i < kLanes; i++) numbers[j * kLanes + i] = (int8_t)lanes[i];
  }
  int32_t sum = 0;
  for (int i = 0; i < kLanes; i++) sum += sums[i];
  const float scale = peak / 127.0f + sum_lanes(poison);
  const int64_t at = row * to.groups() + group;
  to.scales[at] = scale;
  to.sums[at] = sum;
  to.scaled_sums[at] = scale * (float)sum;
}

// Writes a group of 32 numbers of a row in the forms that are needed.
inline void write_group(const Needs& needs, const float* x, const Activations& to, int64_t row, int64_t group) {
  const int64_t at = row * to.inputs + group * kGroup;
  if (needs.int8) quantise_group(x, to, row, group);
  if (needs.floats || needs.rounded) {
    float* floats = to.floats + at;
    for (int i = 0; i < kGroup; i++) floats[i] = needs.rounded ? bf16_to_float(float_to_bf16(x[i])) : x[i];
  }
  if (needs.bf16)
    for (int i = 0; i < kGroup; i++) to.bf16[at + i] = float_to_bf16(x[i]);
}

// The same for a whole row of `inputs` numbers, in memory for whole groups.
inline void write_row(const Needs& needs, float* x, int64_t inputs, const Activations& to, int64_t row) {
  for (int64_t i = inputs; i < to.inputs; i++) x[i] = 0;
  for (int64_t group = 0; group < to.groups(); group++) write_group(needs, x + group * kGroup, to, row, group);
}

}  // namespace octavo
