// A decoder-only transformer: one call computes a whole step, from token ids to logits.
//
// All threads go through the same phases and meet at a barrier where a phase reads what others wrote. Per layer: norm, QKV,
// attention, output, norm, gate and up, down; in a step with LoRA adapters each product has a phase before it. With few rows every thread computes the norms itself, which is cheaper
// than to meet. Nothing that is summed depends on the number of threads or rows.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "sampling.h"

namespace octavo {

// As library.py declares it.
struct Config {
  int32_t vocab_size, hidden_size, intermediate_size, num_layers;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t num_blocks, block_size, kv_float32;
  int32_t num_positions, num_ropes, num_threads;
  int32_t gate;
  float rms_norm_eps, embedding_scale, attention_scale, attention_softcap, logit_softcap;  // soft caps: 0 for none
};

// What a LoRA adapter adds to one product: B (A x). Row-major float32 in the caller's memory; the scale is in B.
struct LowRank {
  int32_t rank;          // 0: it adds nothing
  const float* a;        // [rank, inputs]
  const float* b;        // [rank, outputs]: transposed
};

// One step; the tokens of a request are adjacent.
struct Step {
  int32_t num_tokens, num_requests, num_logits;
  const int32_t* token_ids;      // [num_tokens]
  const int32_t* query_starts;   // [num_requests + 1]: its first token
  const int32_t* computed;       // [num_requests]: tokens that are in the cache already
  const int32_t* table_starts;   // [num_requests + 1]: where its block table begins
  const int32_t* block_tables;
  const int32_t* logits_rows;    // [num_logits]: tokens
  float* logits;                 // [num_logits, vocab_size]
  float* states;                 // [num_logits, hidden_size]: what they are computed of, normed; or null
  const LowRank* const* adapters;  // [num_requests], or null: none has one. Of one: [num_layers * 7] by Role, or null
  int32_t max_rank;              // of all adapters of the step
};

enum class Role : int32_t { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kEmbedding, kHead, kNumMatrices };
enum class Vector : int32_t {
  kAttentionNorm, kMlpNorm, kPostAttentionNorm, kPostMlpNorm, kQueryNorm, kKeyNorm,
  kQueryBias, kKeyBias, kValueBias, kOutputBias, kFinalNorm, kNumVectors
};
constexpr int kLayerMatrices = 7;  // the first of Role
constexpr int kMostFused = 3;      // matrices that read the same input
enum Phase { kEmbed, kNorm, kQkv, kAttend, kOutputProduct, kGateUp, kDownProduct, kLogits, kAdapters, kNumPhases };

struct Layer {
  Matrix matrices[kLayerMatrices];
  std::vector<float> vectors[(int)Vector::kNumVectors];
  int32_t window = 0;  // tokens that may be looked at, 0: all
  int32_t rope = 0;

  const Matrix& matrix(Role role) const { return matrices[(int)role]; }
  const std::vector<float>& vector(Vector name) const { return vectors[(int)name]; }
};

// A share of attention: some heads of one KV head, for some tokens of one request, over some partitions.
struct AttentionItem {
  int32_t request, kv_head, first_head, num_heads, first_token, num_tokens, first_partition, last_partition;
  int32_t split;  // index of the parts that are merged when all are there; -1: not split
};
struct Split {
  int32_t num_parts, first_part;
};

class Decoder {
 public:
  explicit Decoder(const Config& config)
      : config_(config), cache_(cache_shape(config)), pool_(config.num_threads), layers_((size_t)config.num_layers),
        cos_((size_t)config.num_ropes), sin_((size_t)config.num_ropes) {
    for (int i = 0; i < pool_.num_threads(); i++) threads_.emplace_back(config_, cache_.shape());
  }

  Layer& layer(int index) { return layers_[(size_t)index]; }
  std::vector<float>& final_norm() { return final_norm_; }
  Cache& cache() { return cache_; }
  const double* phase_seconds() const { return phase_seconds_; }

  void set_rope(int index, const float* cos, const float* sin) {
    const int64_t size = (int64_t)config_.num_positions * (config_.head_dim / 2);
    cos_[(size_t)index].assign(cos, cos + size);
    sin_[(size_t)index].assign(sin, sin + size);
  }

  // Packs a matrix with all threads. The head is the embedding if none is given.
  void set_matrix(int layer, Role role, Stored stored, int64_t outputs, int64_t inputs, const uint8_t* rows) {
    Form form;
    form_of(stored, form);
    Matrix matrix(form, outputs, inputs);
    const int64_t row_bytes = stored_row_bytes(stored, inputs);
    pool_.run([&](int) {
      int first, last;
      while (pool_.claim(matrix.num_blocks(), first, last))
        for (int block = first; block < last; block++) matrix.pack_block(block, stored, rows, row_bytes);
    });
    if (role == Role::kEmbedding)
      embedding_ = std::move(matrix);
    else if (role == Role::kHead)
      head_ = std::move(matrix);
    else
      layers_[(size_t)layer].matrices[(int)role] = std::move(matrix);
  }

  int64_t weight_bytes() const {
    size_t bytes = embedding_.bytes() + head_.bytes();
    for (const Layer& layer : layers_)
      for (const Matrix& matrix : layer.matrices) bytes += matrix.bytes();
    return (int64_t)bytes;
  }

  void forward(const Step& step) {
    step_ = &step;
    lay_out();
    clock_ = Clock::now();
    pool_.run([this](int thread) { compute(thread); });
  }

  void choose(const Choices& choices) {
    choosers_.resize((size_t)pool_.num_threads());
    for (Chooser& chooser : choosers_) chooser.reserve(choices.vocab_size);
    pool_.run([&](int thread) {
      int row, end;
      while (pool_.claim(choices.num_rows, row, end, 1))
        choices.tokens[row] = choosers_[(size_t)thread].choose(choices, row);
    });
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kRowChunk = 32;    // rows of a unit of work in a product
  static constexpr int kOwnRows = 4;      // up to so many rows every thread computes the norms for itself

  struct Thread {
    Thread(const Config& config, const CacheShape& cache)
        : attention(cache), first((size_t)kRowChunk * kBlock), second((size_t)kRowChunk * kBlock),
          row((size_t)std::max({config.hidden_size, config.num_heads * config.head_dim}) + kGroup),
          heads((size_t)kMaxRows * (size_t)cache.padded_dim()), key((size_t)cache.padded_dim()),
          out((size_t)kMaxRows * (size_t)cache.padded_dim()), part((size_t)kMaxRows * (size_t)cache.padded_dim()) {
      own = Buffers(config.hidden_size, kOwnRows);
    }

    AttentionScratch attention;
    std::vector<float> first, second, row, heads, key, out, part;
    struct Buffers {
      Buffers() = default;
      Buffers(int64_t inputs, int64_t rows) {
        x.inputs = round_up(inputs, kGroup);
        const int64_t numbers = rows * x.inputs, groups = rows * x.groups();
        memory = Memory((size_t)(numbers * (4 + 2 + 1) + groups * 12 + 64));
        uint8_t* at = memory.as<uint8_t>();
        const auto take = [&at](int64_t bytes) { return std::exchange(at, at + bytes); };
        x.floats = (float*)take(numbers * 4);
        x.scales = (float*)take(groups * 4);
        x.scaled_sums = (float*)take(groups * 4);
        x.sums = (int32_t*)take(groups * 4);
        x.bf16 = (uint16_t*)take(numbers * 2);
        x.int8 = (int8_t*)take(numbers);
      }
      Activations x;
      Memory memory;
    } own;
  };
  using Buffers = Thread::Buffers;

  static CacheShape cache_shape(const Config& c) {
    return {c.num_layers, c.num_blocks, c.block_size, c.num_kv_heads, c.head_dim, c.kv_float32 != 0};
  }

  int64_t query_size() const { return (int64_t)config_.num_heads * config_.head_dim; }
  int64_t kv_size() const { return (int64_t)config_.num_kv_heads * config_.head_dim; }
  int64_t qkv_size() const { return query_size() + 2 * kv_size(); }
  float* residual(int64_t row) const { return residual_.as<float>() + row * config_.hidden_size; }
  float* branch(int64_t row) const { return branch_.as<float>() + row * config_.hidden_size; }
  float* qkv(int64_t row) const { return qkv_.as<float>() + row * qkv_size(); }
  float* attended(int64_t row) const { return attended_.as<float>() + row * query_size(); }

  // --- What a step needs before the threads start -------------------------------------------------------------

  void lay_out() {
    reserve(step_->num_tokens);
    reserve_low_rank();
    token_request_.clear();
    items_.clear();
    splits_.clear();
    int32_t num_parts = 0;
    const int group = config_.num_heads / config_.num_kv_heads;
    const int heads_at_once = std::min(group, kMaxRows), tokens_at_once = std::max(1, kMaxRows / group);
    store_in_attention_ = group <= kMaxRows;
    for (int32_t request = 0; request < step_->num_requests; request++) {
      const int32_t start = step_->query_starts[request], end = step_->query_starts[request + 1];
      token_request_.insert(token_request_.end(), (size_t)(end - start), request);
      if (end - start > 1) store_in_attention_ = false;
      for (int32_t token = start; token < end; token += tokens_at_once) {
        const int32_t tokens = std::min(tokens_at_once, end - token);
        const int32_t partitions = (int32_t)((position(token + tokens - 1, request) / config_.block_size) /
                                             cache_.shape().partition_blocks()) + 1;
        for (int32_t kv_head = 0; kv_head < config_.num_kv_heads; kv_head++)
          for (int head = 0; head < group; head += heads_at_once) {
            AttentionItem item{request, kv_head, kv_head * group + head, std::min(heads_at_once, group - head),
                               token, tokens, 0, partitions, -1};
            if (end - start > 1 || partitions == 1) {
              items_.push_back(item);
              continue;
            }
            item.split = (int32_t)splits_.size();
            splits_.push_back({partitions, num_parts});
            num_parts += partitions;
            for (int32_t part = 0; part < partitions; part++) {
              item.first_partition = part, item.last_partition = part + 1;
              items_.push_back(item);
            }
          }
      }
    }
    if (parts_missing_.size() < splits_.size()) parts_missing_ = std::vector<std::atomic<int32_t>>(splits_.size() * 2);
    for (size_t i = 0; i < splits_.size(); i++) parts_missing_[i].store(splits_[i].num_parts, std::memory_order_relaxed);
    const size_t floats = (size_t)num_parts * kMaxRows * (size_t)cache_.shape().padded_dim();
    if (part_outputs_.size() < floats) part_outputs_.resize(floats);
    if (part_sums_.size() < (size_t)num_parts * kMaxRows) part_sums_.resize((size_t)num_parts * kMaxRows);
  }

  void reserve(int64_t rows) {
    if (rows <= reserved_rows_) return;
    reserved_rows_ = rows;
    hidden_ = Buffers(config_.hidden_size, rows);
    attention_out_ = Buffers(query_size(), rows);
    middle_ = Buffers(config_.intermediate_size, rows);
    residual_ = Memory((size_t)(rows * config_.hidden_size * 4));
    branch_ = Memory((size_t)(rows * config_.hidden_size * 4));
    qkv_ = Memory((size_t)(rows * qkv_size() * 4));
    attended_ = Memory((size_t)(rows * query_size() * 4));
  }

  void reserve_low_rank() {
    if (!step_->adapters) return;
    const size_t bytes = (size_t)step_->num_tokens * kMostFused * (size_t)step_->max_rank * 4;
    if (low_rank_.bytes() < bytes) low_rank_ = Memory(bytes);
  }

  int32_t position(int32_t token, int32_t request) const {
    return step_->computed[request] + token - step_->query_starts[request];
  }

  // --- The phases, on every thread ----------------------------------------------------------------------------

  void compute(int thread) {
    const int rows = step_->num_tokens;
    each_row(rows, [&](int row) { embed(row); });
    meet(thread, kEmbed);
    for (int index = 0; index < config_.num_layers; index++) {
      const Layer& layer = layers_[(size_t)index];
      const Matrix &q = layer.matrix(Role::kQuery), &k = layer.matrix(Role::kKey), &v = layer.matrix(Role::kValue);
      const Activations& x = norm(thread, rows, layer.vector(Vector::kAttentionNorm), needs({&q, &k, &v}));
      reduce(thread, index, {Role::kQuery, Role::kKey, Role::kValue}, x);
      project_qkv(thread, index, x);
      meet(thread, kQkv);
      attend(thread, index, needs({&layer.matrix(Role::kOutput)}));
      meet(thread, kAttend);
      reduce(thread, index, {Role::kOutput}, attention_out_.x);
      add_product(thread, index, Role::kOutput, attention_out_.x, layer.vector(Vector::kOutputBias),
                  layer.vector(Vector::kPostAttentionNorm));
      meet(thread, kOutputProduct);
      const Matrix &gate = layer.matrix(Role::kGate), &up = layer.matrix(Role::kUp), &down = layer.matrix(Role::kDown);
      const Activations& y = norm(thread, rows, layer.vector(Vector::kMlpNorm), needs({&gate, &up}));
      reduce(thread, index, {Role::kGate, Role::kUp}, y);
      gate_and_up(thread, index, y, needs({&down}));
      meet(thread, kGateUp);
      reduce(thread, index, {Role::kDown}, middle_.x);
      add_product(thread, index, Role::kDown, middle_.x, {}, layer.vector(Vector::kPostMlpNorm));
      meet(thread, kDownProduct);
    }
    if (step_->num_logits > 0) compute_logits(thread);
  }

  Needs needs(std::initializer_list<const Matrix*> matrices) const {
    Needs all;
    for (const Matrix* matrix : matrices) all.add(matrix->form());
    if (step_->adapters) all.floats = true;
    return all;
  }

  void meet(int thread, Phase phase) {
    pool_.barrier();
    if (thread != 0) return;
    const Clock::time_point now = Clock::now();
    phase_seconds_[phase] += std::chrono::duration<double>(now - clock_).count();
    clock_ = now;
  }

  template <class Work>
  void each_row(int rows, const Work& work) {
    int first, last;
    while (pool_.claim(rows, first, last))
      for (int row = first; row < last; row++) work(row);
  }

  void embed(int row) {
    float* out = residual(row);
    embedding_.unpack_output(step_->token_ids[row], out);
    if (config_.embedding_scale != 1.0f)
      for (int i = 0; i < config_.hidden_size; i++) out[i] *= config_.embedding_scale;
  }

  // The normed rows in the forms that the next products need.
  const Activations& norm(int thread, int rows, const std::vector<float>& weight, const Needs& needs,
                          const int32_t* chosen = nullptr) {
    Thread& own = threads_[(size_t)thread];
    const auto one = [&](int row, const Activations& to) {
      rms_norm(residual(chosen ? chosen[row] : row), weight.data(), config_.rms_norm_eps, config_.hidden_size,
               own.row.data());
      write_row(needs, own.row.data(), config_.hidden_size, to, row);
    };
    if (rows <= kOwnRows) {
      for (int row = 0; row < rows; row++) one(row, own.own.x);
      return own.own.x;
    }
    each_row(rows, [&](int row) { one(row, hidden_.x); });
    meet(thread, kNorm);
    return hidden_.x;
  }

  // Calls done(block, first row, number of rows) for every part of a product of so many blocks of outputs.
  template <class Work>
  void each_unit(int blocks, int rows, const Work& work) {
    const int chunks = (rows + kRowChunk - 1) / kRowChunk;
    int first, last;
    while (pool_.claim(blocks * chunks, first, last))
      for (int unit = first; unit < last; unit++) {
        const int row = unit % chunks * kRowChunk;
        work(unit / chunks, row, std::min(kRowChunk, rows - row));
      }
  }

  // What the adapter of a token adds to a product; null: nothing.
  const LowRank* adapter(int token, int layer, Role role) const {
    const LowRank* all = step_->adapters[token_request_[(size_t)token]];
    if (!all) return nullptr;
    const LowRank& one = all[layer * kLayerMatrices + (int)role];
    return one.rank > 0 ? &one : nullptr;
  }

  float* low_rank(int token, int place) const {
    return low_rank_.as<float>() + ((int64_t)token * kMostFused + place) * step_->max_rank;
  }

  // A x of every token that has an adapter, for matrices that read the same x. Nothing in a step without adapters.
  void reduce(int thread, int layer, std::initializer_list<Role> roles, const Activations& x) {
    if (!step_->adapters) return;
    const int num_roles = (int)roles.size(), ranks = step_->max_rank;
    each_row(step_->num_tokens * num_roles * ranks, [&](int unit) {
      const int rank = unit % ranks, place = unit / ranks % num_roles, token = unit / ranks / num_roles;
      const LowRank* one = adapter(token, layer, roles.begin()[place]);
      if (!one || rank >= one->rank) return;
      const int64_t inputs = layers_[(size_t)layer].matrix(roles.begin()[place]).inputs();
      low_rank(token, place)[rank] = dot(one->a + rank * inputs, x.floats + token * x.inputs, inputs);
    });
    meet(thread, kAdapters);
  }

  // Adds B (A x) to a block of outputs, after `reduce`; `place` is the role's in the list that it was given.
  void add_low_rank(int layer, Role role, int place, int block, int first_row, int num_rows, float* products) const {
    if (!step_->adapters) return;
    const int64_t outputs = layers_[(size_t)layer].matrix(role).outputs();
    const int64_t column = (int64_t)block * kBlock, size = std::min<int64_t>(kBlock, outputs - column);
    for (int row = 0; row < num_rows; row++) {
      const LowRank* one = adapter(first_row + row, layer, role);
      if (!one) continue;
      const float* reduced = low_rank(first_row + row, place);
      float sums[kBlock] = {};
      for (int32_t rank = 0; rank < one->rank; rank++) add_multiple(sums, reduced[rank], one->b + rank * outputs + column, size);
      for (int64_t i = 0; i < size; i++) products[row * kBlock + i] += sums[i];
    }
  }

  void project_qkv(int thread, int index, const Activations& x) {
    const Layer& layer = layers_[(size_t)index];
    constexpr Role kRoles[3] = {Role::kQuery, Role::kKey, Role::kValue};
    constexpr Vector kBiases[3] = {Vector::kQueryBias, Vector::kKeyBias, Vector::kValueBias};
    const int64_t columns[3] = {0, query_size(), query_size() + kv_size()};
    int blocks = 0;
    for (Role role : kRoles) blocks += layer.matrix(role).num_blocks();
    float* products = threads_[(size_t)thread].first.data();
    each_unit(blocks, step_->num_tokens, [&](int block, int first_row, int num_rows) {
      int which = 0;
      while (block >= layer.matrix(kRoles[which]).num_blocks()) block -= layer.matrix(kRoles[which++]).num_blocks();
      const Matrix& matrix = layer.matrix(kRoles[which]);
      const std::vector<float>& bias = layer.vector(kBiases[which]);
      matrix.multiply_block(block, x, first_row, num_rows, products);
      add_low_rank(index, kRoles[which], which, block, first_row, num_rows, products);
      const int64_t column = (int64_t)block * kBlock, size = std::min<int64_t>(kBlock, matrix.outputs() - column);
      for (int row = 0; row < num_rows; row++) {
        float* out = qkv(first_row + row) + columns[which] + column;
        const float* from = products + row * kBlock;
        if (bias.empty())
          std::memcpy(out, from, (size_t)size * 4);
        else
          for (int64_t i = 0; i < size; i++) out[i] = from[i] + bias[(size_t)(column + i)];
      }
    });
  }

  // The residual gets the product, or with a norm after it (Gemma), the normed product.
  void add_product(int thread, int index, Role role, const Activations& x, const std::vector<float>& bias,
                   const std::vector<float>& post_norm) {
    const Matrix& matrix = layers_[(size_t)index].matrix(role);
    float* products = threads_[(size_t)thread].first.data();
    each_unit(matrix.num_blocks(), step_->num_tokens, [&](int block, int first_row, int num_rows) {
      matrix.multiply_block(block, x, first_row, num_rows, products);
      add_low_rank(index, role, 0, block, first_row, num_rows, products);
      const int64_t column = (int64_t)block * kBlock, size = std::min<int64_t>(kBlock, matrix.outputs() - column);
      for (int row = 0; row < num_rows; row++) {
        float* from = products + row * kBlock;
        if (!bias.empty())
          for (int64_t i = 0; i < size; i++) from[i] += bias[(size_t)(column + i)];
        if (!post_norm.empty()) {
          std::memcpy(branch(first_row + row) + column, from, (size_t)size * 4);
          continue;
        }
        float* out = residual(first_row + row) + column;
        for (int64_t i = 0; i < size; i++) out[i] += from[i];
      }
    });
    if (post_norm.empty()) return;
    pool_.barrier();
    each_row(step_->num_tokens, [&](int row) {
      float *normed = threads_[(size_t)thread].row.data(), *out = residual(row);
      rms_norm(branch(row), post_norm.data(), config_.rms_norm_eps, config_.hidden_size, normed);
      for (int i = 0; i < config_.hidden_size; i++) out[i] += normed[i];
    });
  }

  void gate_and_up(int thread, int index, const Activations& x, const Needs& needs) {
    const Layer& layer = layers_[(size_t)index];
    const Matrix &gate = layer.matrix(Role::kGate), &up = layer.matrix(Role::kUp);
    Thread& own = threads_[(size_t)thread];
    each_unit(gate.num_blocks(), step_->num_tokens, [&](int block, int first_row, int num_rows) {
      gate.multiply_block(block, x, first_row, num_rows, own.first.data());
      up.multiply_block(block, x, first_row, num_rows, own.second.data());
      add_low_rank(index, Role::kGate, 0, block, first_row, num_rows, own.first.data());
      add_low_rank(index, Role::kUp, 1, block, first_row, num_rows, own.second.data());
      for (int row = 0; row < num_rows; row++) {  // outputs beyond the last are products with zeros: 0
        float* gates = own.first.data() + row * kBlock;
        gate_block((Gate)config_.gate, gates, own.second.data() + row * kBlock, gates);
        write_group(needs, gates, middle_.x, first_row + row, block);
      }
    });
  }

  void compute_logits(int thread) {
    const Matrix& head = head_.empty() ? embedding_ : head_;
    const int rows = step_->num_logits;
    const Activations& x = norm(thread, rows, final_norm_, needs({&head}), step_->logits_rows);
    if (step_->states)
      for (int row = thread; row < rows; row += pool_.num_threads())
        rms_norm(residual(step_->logits_rows[row]), final_norm_.data(), config_.rms_norm_eps, config_.hidden_size,
                 step_->states + row * (int64_t)config_.hidden_size);
    float* products = threads_[(size_t)thread].first.data();
    const float cap = config_.logit_softcap;
    each_unit(head.num_blocks(), rows, [&](int block, int first_row, int num_rows) {
      head.multiply_block(block, x, first_row, num_rows, products);
      if (cap > 0)
        for (int i = 0; i < num_rows * kBlock; i += kLanes)
          store(products + i, cap * tanh(load_floats(products + i) / cap));
      const int64_t column = (int64_t)block * kBlock, size = std::min<int64_t>(kBlock, head.outputs() - column);
      for (int row = 0; row < num_rows; row++)
        std::memcpy(step_->logits + (first_row + row) * (int64_t)head.outputs() + column, products + row * kBlock,
                    (size_t)size * 4);
    });
    meet(thread, kLogits);
  }

  // --- Attention ------------------------------------------------------------------------------------------------

  void attend(int thread, int index, const Needs& needs) {
    if (!store_in_attention_) {
      each_row(step_->num_tokens * config_.num_kv_heads, [&](int unit) {
        store_token(thread, index, unit / config_.num_kv_heads, unit % config_.num_kv_heads);
      });
      pool_.barrier();
    }
    int first, last;
    while (pool_.claim((int)items_.size(), first, last, 1)) {
      if (cache_.shape().float32)
        attend_item<true>(thread, index, items_[(size_t)first], needs);
      else
        attend_item<false>(thread, index, items_[(size_t)first], needs);
    }
    if (config_.head_dim % kGroup == 0) return;
    pool_.barrier();
    each_row(step_->num_tokens, [&](int row) {
      float* copy = threads_[(size_t)thread].row.data();
      std::memcpy(copy, attended(row), (size_t)query_size() * 4);
      write_row(needs, copy, query_size(), attention_out_.x, row);
    });
  }

  // Norm (if any) and rotation of one head.
  void turn(const Layer& layer, const std::vector<float>& norm, int32_t position, const float* from, float* to) const {
    const int64_t dim = config_.head_dim, half = dim / 2;
    if (norm.empty())
      std::memcpy(to, from, (size_t)dim * 4);
    else
      rms_norm(from, norm.data(), config_.rms_norm_eps, dim, to);
    const size_t rope = (size_t)layer.rope;
    rotate(to, cos_[rope].data() + position * half, sin_[rope].data() + position * half, half);
  }

  void store_token(int thread, int index, int32_t token, int32_t kv_head) {
    const Layer& layer = layers_[(size_t)index];
    const int32_t request = token_request_[(size_t)token], at = position(token, request);
    const int32_t block = step_->block_tables[step_->table_starts[request] + at / config_.block_size];
    const float* key = qkv(token) + query_size() + (int64_t)kv_head * config_.head_dim;
    float* turned = threads_[(size_t)thread].key.data();
    turn(layer, layer.vector(Vector::kKeyNorm), at, key, turned);
    cache_.store_token(index, block, at % config_.block_size, kv_head, turned, key + kv_size());
  }

  template <bool kFloat32>
  void attend_item(int thread, int index, const AttentionItem& item, const Needs& needs) {
    const Layer& layer = layers_[(size_t)index];
    Thread& own = threads_[(size_t)thread];
    const int64_t dim = cache_.shape().padded_dim();
    const int rows = item.num_heads * item.num_tokens;
    Span spans[kMaxRows];
    for (int row = 0; row < rows; row++) {
      const int32_t token = item.first_token + row / item.num_heads, at = position(token, item.request);
      spans[row] = {layer.window > 0 ? std::max(0, at + 1 - layer.window) : 0, at + 1};
      turn(layer, layer.vector(Vector::kQueryNorm), at,
           qkv(token) + (item.first_head + row % item.num_heads) * (int64_t)config_.head_dim,
           own.heads.data() + row * dim);
    }
    const int64_t partition_slots = cache_.shape().partition_blocks() * config_.block_size;
    const bool reaches_end = item.last_partition * partition_slots >= spans[rows - 1].last;
    if (store_in_attention_ && reaches_end) store_token(thread, index, item.first_token, item.kv_head);
    Attention<kFloat32> attention(cache_, own.attention, config_.attention_softcap);
    attention.set_queries(rows, [&](int row) { return own.heads.data() + row * dim; }, config_.attention_scale);
    const int32_t* table = step_->block_tables + step_->table_starts[item.request];
    const int64_t first = std::max<int64_t>(item.first_partition, spans[0].first / partition_slots);
    Partial totals[kMaxRows];
    std::fill(totals, totals + kMaxRows, Partial{kMasked, 0});
    std::fill(own.out.begin(), own.out.end(), 0.0f);
    for (int64_t part = first; part < item.last_partition; part++) {
      Partial partials[kMaxRows];
      attention.partition(index, item.kv_head, table, part, spans, own.part.data(), partials);
      for (int row = 0; row < rows; row++)
        merge(totals[row], own.out.data() + row * dim, partials[row], own.part.data() + row * dim, dim);
    }
    if (item.split >= 0 && !collect(item, rows, own.out, totals)) return;
    for (int row = 0; row < rows; row++)
      write_head(needs, item.first_token + row / item.num_heads, item.first_head + row % item.num_heads,
                 own.out.data() + row * dim, totals[row].sum);
  }

  // Leaves this item's part; the last to come merges all parts in order and returns true.
  bool collect(const AttentionItem& item, int rows, std::vector<float>& out, Partial* totals) {
    const Split& split = splits_[(size_t)item.split];
    const int64_t dim = cache_.shape().padded_dim(), size = kMaxRows * dim;
    const int32_t part = split.first_part + item.first_partition;
    std::copy(out.begin(), out.begin() + rows * dim, part_outputs_.begin() + part * size);
    std::copy(totals, totals + rows, part_sums_.begin() + part * kMaxRows);
    std::atomic<int32_t>& missing = parts_missing_[(size_t)item.split];
    if (missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return false;
    missing.store(split.num_parts, std::memory_order_relaxed);  // for the next layer, which is beyond a barrier
    std::fill(totals, totals + rows, Partial{kMasked, 0});
    std::fill(out.begin(), out.end(), 0.0f);
    for (int32_t i = 0; i < split.num_parts; i++)
      for (int row = 0; row < rows; row++) {
        const Partial& one = part_sums_[(size_t)((split.first_part + i) * kMaxRows + row)];
        if (one.sum != 0)
          merge(totals[row], out.data() + row * dim, one,
                part_outputs_.data() + (split.first_part + i) * size + row * dim, dim);
      }
    return true;
  }

  void write_head(const Needs& needs, int32_t token, int32_t head, float* out, float sum) {
    const int64_t dim = config_.head_dim;
    const float inverse = 1.0f / sum;
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    if (dim % kGroup != 0) {
      std::memcpy(attended(token) + head * dim, out, (size_t)dim * 4);
      return;
    }
    for (int64_t group = 0; group < dim / kGroup; group++)
      write_group(needs, out + group * kGroup, attention_out_.x, token, head * dim / kGroup + group);
  }

  const Config config_;
  Cache cache_;
  Pool pool_;
  std::vector<Layer> layers_;
  Matrix embedding_, head_;
  std::vector<float> final_norm_;
  std::vector<std::vector<float>> cos_, sin_;
  std::vector<Thread> threads_;
  std::vector<Chooser> choosers_;

  const Step* step_ = nullptr;
  bool store_in_attention_ = false;  // only decodes: keys are stored by whoever attends to them first
  std::vector<int32_t> token_request_;
  std::vector<AttentionItem> items_;
  std::vector<Split> splits_;
  std::vector<std::atomic<int32_t>> parts_missing_;
  std::vector<float> part_outputs_;
  std::vector<Partial> part_sums_;

  int64_t reserved_rows_ = 0;
  Buffers hidden_, attention_out_, middle_;
  Memory residual_, branch_, qkv_, attended_, low_rank_;
  Clock::time_point clock_;
  double phase_seconds_[kNumPhases] = {};
};

}  // namespace octavo
