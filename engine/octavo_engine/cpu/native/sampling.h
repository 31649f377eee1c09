// Choosing tokens from rows of logits: the most likely one, or one drawn under temperature, min-p and top-p.
//
// What sampler.py and vocabulary.py say and do in torch, a row at a time: no sort, and draws by inverting sums of blocks.
// A row is one thread's work, summed in a fixed order: what it gets does not depend on the other rows.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"

namespace octavo {

constexpr int64_t kSpan = 64;  // tokens in a block; the vocabulary is a multiple
constexpr int32_t kNotFinite = std::numeric_limits<int32_t>::min();

// As library.py declares it. Arrays but `logits` have an entry for each row to choose for.
struct Choices {
  int64_t vocab_size;
  int32_t num_rows;
  const float* logits;                 // [any, vocab_size]
  const int32_t* rows;                 // of `logits`
  const float* inverse_temperatures;   // 0: the most likely token
  const float* min_ps;                 // tokens less likely than this share of the most likely are left out
  const double* top_ps;                // the most likely tokens that reach this share are kept; 1: all
  const double* uniforms;              // [0, 1 - 2^-52]
  const int32_t* bounds;               // draw from what comes before this token in order; -1: from all
  int32_t* tokens;                     // the result; ~token if top-p leaves the token out; kNotFinite
};

class Chooser {
 public:
  void reserve(int64_t vocab_size) {
    weights_.resize((size_t)vocab_size);
    sums_.resize((size_t)(vocab_size / kSpan));
  }

  // Of a vocabulary that there is room for.
  int32_t choose(const Choices& choices, int row) {
    const float* logits = choices.logits + choices.rows[row] * choices.vocab_size;
    const int64_t first = most_likely(logits);
    if (first < 0) return kNotFinite;
    if (choices.inverse_temperatures[row] == 0) return (int32_t)first;
    const double whole = weigh(logits, logits[first], choices.inverse_temperatures[row], choices.min_ps[row]);
    const int64_t bound = choices.bounds[row];
    const double total = bound < 0 ? whole : keep_before(bound);
    const int64_t token = invert(choices.uniforms[row], total);
    const bool is_kept = choices.top_ps[row] >= 1 || weight_before(token) < choices.top_ps[row] * whole;
    return is_kept ? (int32_t)token : ~(int32_t)token;
  }

 private:
  int64_t size() const { return (int64_t)weights_.size(); }

  // The first of the highest; -1 if there is a NaN, an infinity or nothing but -infinity.
  int64_t most_likely(const float* logits) const {
    const float infinity = std::numeric_limits<float>::infinity();
    Ints is_nan{};
    float highest = -infinity;
    int64_t found = -1;
    for (int64_t start = 0; start < size(); start += kSpan) {
      Floats top = load_floats(logits + start);
      is_nan |= top != top;
      for (int64_t i = kLanes; i < kSpan; i += kLanes) {
        const Floats x = load_floats(logits + start + i);
        is_nan |= x != x;
        top = x > top ? x : top;
      }
      if (const float one = max_lanes(top); one > highest) highest = one, found = start;
    }
    for (int lane = 0; lane < kLanes; lane++)
      if (is_nan[lane] != 0) return -1;
    if (found < 0 || highest == infinity) return -1;
    while (logits[found] != highest) found++;
    return found;
  }

  // Weights in proportion to the probabilities, 1 for the most likely, and their sums; returns the sum of all.
  double weigh(const float* logits, float highest, float inverse_temperature, float min_p) {
    double total = 0;
    for (int64_t start = 0; start < size(); start += kSpan) {
      Floats sum{};
      for (int64_t i = start; i < start + kSpan; i += kLanes) {
        const Floats weight = exponential((load_floats(logits + i) - highest) * inverse_temperature);
        const Floats kept = weight < min_p ? Floats{} : weight;
        store(weights_.data() + i, kept);
        sum += kept;
      }
      total += sums_[(size_t)(start / kSpan)] = sum_lanes(sum);
    }
    return total;
  }

  // Leaves the weights of the tokens that come before `token`: heavier ones, and of equal ones those with lower ids.
  double keep_before(int64_t token) {
    const float own = weights_[(size_t)token];
    double total = 0;
    for (int64_t start = 0; start < size(); start += kSpan) {
      float sum = 0;
      for (int64_t i = start; i < start + kSpan; i++) {
        float& weight = weights_[(size_t)i];
        if (weight < own || (weight == own && i >= token)) weight = 0;
        sum += weight;
      }
      total += sums_[(size_t)(start / kSpan)] = sum;
    }
    return total;
  }

  double weight_before(int64_t token) const {
    const float own = weights_[(size_t)token];
    double total = 0;
    for (int64_t start = 0; start < size(); start += kSpan) {
      Floats sum{};
      for (int64_t i = start; i < start + kSpan; i += kLanes) {
        const Floats weight = load_floats(weights_.data() + i);
        sum += weight > own ? weight : Floats{};
      }
      total += sum_lanes(sum);
    }
    int64_t num_equal = 0;
    for (int64_t i = 0; i < token; i++) num_equal += weights_[(size_t)i] == own;
    return total + (double)num_equal * own;
  }

  // The token at this share of the sum, which has a weight above 0.
  int64_t invert(double uniform, double total) const {
    const double wanted = uniform * total;
    int64_t block = 0;
    double before = 0;
    while (before + sums_[(size_t)block] <= wanted) before += sums_[(size_t)block++];
    const float* weights = weights_.data() + block * kSpan;
    double inside = 0;
    for (int64_t i = 0; i < kSpan; i++) inside += weights[i];
    // Sums in another order round differently: the rest may be 1 by a hair.
    const double share = std::min((wanted - before) / sums_[(size_t)block], 1 - 0x1p-52);
    double end = weights[0];
    int64_t place = 0;
    while (end <= share * inside) end += weights[++place];
    return block * kSpan + place;
  }

  std::vector<float> weights_, sums_;
};

}  // namespace octavo
