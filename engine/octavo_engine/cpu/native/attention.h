// Attention over the paged KV cache, in place.
//
// A block of the cache has, for each KV head, its keys in tiles of 8 slots [head_dim, 8] (so that scores of 8 slots are summed
// in a vector, without sums across lanes) and its values [slots, head_dim]. Numbers are float16, or float32 for float32.
//
// A query's context is cut into partitions of a fixed number of blocks, counted from position 0. Each gives a softmax
// over its own slots; these are merged in order. Who computes which partition has no part in the result, nor have the
// other queries: a query gets the same bits in any batch and however its prompt is cut.
#pragma once

#include <cfloat>

#include "rows.h"

namespace octavo {

constexpr int kTileSlots = 8;
constexpr int kPartitionTiles = 32;  // at most, unless a block has more
constexpr int kMaxRows = 6;          // queries (heads of one KV head, tokens) that share a load of keys and values
constexpr float kMasked = -1e30f;    // far below any score, yet a number

struct CacheShape {
  int64_t num_layers, num_blocks, block_size, num_kv_heads, head_dim;
  bool float32;

  int64_t padded_dim() const { return round_up(head_dim, 16); }
  int64_t tiles() const { return (block_size + kTileSlots - 1) / kTileSlots; }
  int64_t item() const { return float32 ? 4 : 2; }
  int64_t key_bytes() const { return tiles() * kTileSlots * padded_dim() * item(); }  // of one block and KV head
  int64_t value_bytes() const { return block_size * padded_dim() * item(); }
  int64_t head_bytes() const { return key_bytes() + value_bytes(); }
  int64_t block_bytes() const { return num_kv_heads * head_bytes(); }
  int64_t layer_bytes() const { return num_blocks * block_bytes(); }
  int64_t partition_blocks() const { return tiles() < kPartitionTiles ? kPartitionTiles / tiles() : 1; }
};

template <bool kFloat32>
struct Number;
template <>
struct Number<true> {
  using Type = float;
  static Floats load(const float* from) { return load_floats(from); }
  static void store(float* to, float value) { *to = value; }
};
template <>
struct Number<false> {
  using Type = uint16_t;
  static Floats load(const uint16_t* from) { return load_half(from); }
  // Beyond float16's range the largest number is kept rather than infinity, which would poison every later token.
  static void store(uint16_t* to, float value) {
    *to = float_to_half(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
  }
};

class Cache {
 public:
  explicit Cache(const CacheShape& shape) : shape_(shape), memory_((size_t)(shape.num_layers * shape.layer_bytes())) {}

  const CacheShape& shape() const { return shape_; }

  uint8_t* keys(int64_t layer, int64_t block, int64_t head) const {
    return memory_.as<uint8_t>() + layer * shape_.layer_bytes() + block * shape_.block_bytes() +
           head * shape_.head_bytes();
  }
  uint8_t* values(int64_t layer, int64_t block, int64_t head) const {
    return keys(layer, block, head) + shape_.key_bytes();
  }

  void store_token(int64_t layer, int64_t block, int64_t slot, int64_t head, const float* key, const float* value) {
    if (shape_.float32)
      store_as<true>(layer, block, slot, head, key, value);
    else
      store_as<false>(layer, block, slot, head, key, value);
  }

  void copy_block(int64_t from, int64_t to) {
    for (int64_t layer = 0; layer < shape_.num_layers; layer++)
      std::memcpy(keys(layer, to, 0), keys(layer, from, 0), (size_t)shape_.block_bytes());
  }

 private:
  template <bool kFloat32>
  void store_as(int64_t layer, int64_t block, int64_t slot, int64_t head, const float* key, const float* value) {
    using Type = typename Number<kFloat32>::Type;
    const int64_t dim = shape_.padded_dim();
    Type* k = (Type*)keys(layer, block, head) + slot / kTileSlots * kTileSlots * dim + slot % kTileSlots;
    Type* v = (Type*)values(layer, block, head) + slot * dim;
    for (int64_t d = 0; d < dim; d++) {  // the padding too: a block's memory may hold anything
      Number<kFloat32>::store(k + d * kTileSlots, d < shape_.head_dim ? key[d] : 0.0f);
      Number<kFloat32>::store(v + d, d < shape_.head_dim ? value[d] : 0.0f);
    }
  }

  CacheShape shape_;
  Memory memory_;
};

// A softmax over some slots, not yet divided: sum of weights, the largest score, and the weighted sum of values.
struct Partial {
  float largest, sum;
};

// What one thread needs to attend.
struct AttentionScratch {
  AttentionScratch(const CacheShape& shape) {
    const int64_t tiles = shape.partition_blocks() * shape.tiles() + 1;
    scores = Memory((size_t)(kMaxRows * tiles * kTileSlots * 4));
    queries = Memory((size_t)(kMaxRows * shape.padded_dim() * kTileSlots * 4));
    part = Memory((size_t)(kMaxRows * shape.padded_dim() * 4));
    key_tiles = Memory((size_t)(tiles * sizeof(void*)));
    values = Memory((size_t)(tiles * sizeof(void*)));
  }
  Memory scores, queries, part, key_tiles, values;
};

struct Span {
  int64_t first, last;  // positions that a row may look at: [first, last)
};

template <bool kFloat32>
class Attention {
  using Type = typename Number<kFloat32>::Type;
  static constexpr int kDims = kLanes / kTileSlots;  // dimensions of 8 slots in a vector

 public:
  Attention(const Cache& cache, AttentionScratch& scratch, float softcap)
      : cache_(cache), shape_(cache.shape()), softcap_(softcap), dim_(cache.shape().padded_dim()),
        scores_(scratch.scores.as<float>()), queries_(scratch.queries.as<float>()),
        key_tiles_(scratch.key_tiles.as<const Type*>()), values_(scratch.values.as<const Type*>()) {}

  // The rows that the following partitions are for, scaled: `query(row)` points to head_dim floats.
  template <class Query>
  void set_queries(int num_rows, const Query& query, float scale) {
    num_rows_ = num_rows;
    for (int row = 0; row < num_rows; row++) {
      const float* q = query(row);
      float* to = queries_ + row * dim_ * kCopies;
      for (int64_t d = 0; d < dim_; d++) {
        const float value = d < shape_.head_dim ? q[d] * scale : 0.0f;
        if constexpr (kDims == 1)
          to[d] = value;
        else
          for (int i = 0; i < kTileSlots; i++) to[d * kTileSlots + i] = value;
      }
    }
  }

  // Attends to the partition's slots. `out` is [rows, padded_dim], `partials` [rows].
  void partition(int64_t layer, int64_t head, const int32_t* table, int64_t index, const Span* spans, float* out,
                 Partial* partials) {
    const int64_t blocks = shape_.partition_blocks(), first_block = index * blocks;
    int64_t first = spans[0].first, last = spans[0].last;
    for (int row = 1; row < num_rows_; row++) {
      first = std::min(first, spans[row].first);
      last = std::max(last, spans[row].last);
    }
    const int64_t start = std::max(first_block, first / shape_.block_size);
    const int64_t end = std::min(first_block + blocks, (last + shape_.block_size - 1) / shape_.block_size);
    // Scores stand at fixed places within the partition, so that vectors of them are summed in a fixed order.
    const int64_t tiles = shape_.tiles(), begin_tile = (start - first_block) * tiles;
    first_tile_ = begin_tile - begin_tile % 2;
    num_tiles_ = (end - first_block) * tiles;
    for (int64_t tile = first_tile_; tile < num_tiles_; tile++) {
      const int64_t block = std::max(first_block + tile / tiles, start);  // an odd first tile: read, then masked
      const int64_t in_block = tile % tiles;
      key_tiles_[tile] = (const Type*)cache_.keys(layer, table[block], head) + in_block * kTileSlots * dim_;
      values_[tile] = (const Type*)cache_.values(layer, table[block], head) + in_block * kTileSlots * dim_;
    }
    padded_tiles_ = num_tiles_ + num_tiles_ % 2;
    score_all();
    for (int row = 0; row < num_rows_; row++) partials[row] = soften(row, first_block * shape_.block_size, spans[row]);
    last_slot_ = last - first_block * shape_.block_size;
    weigh_all(out);
  }

 private:
  static constexpr int64_t kCopies = kDims == 1 ? 1 : kTileSlots;  // of each number of a query
  float* row_scores(int row) const { return scores_ + row * (shape_.partition_blocks() * shape_.tiles() + 1) * kTileSlots; }

  void score_all() {
    switch (num_rows_) {
      case 1: return score_rows<1, 4>();
      case 2: return score_rows<2, 4>();
      case 3: return score_rows<3, 2>();
      case 4: return score_rows<4, 2>();
      case 5: return score_rows<5, 2>();
      default: return score_rows<6, 2>();
    }
  }

  template <int kRows, int kTiles>
  void score_rows() {
    int64_t tile = first_tile_;
    for (; tile + kTiles <= num_tiles_; tile += kTiles) score_tiles<kRows, kTiles>(tile);
    for (; tile < num_tiles_; tile++) score_tiles<kRows, 1>(tile);
  }

  template <int kRows, int kTiles>
  void score_tiles(int64_t tile) {
    Floats total[kRows][kTiles] = {};
    for (int64_t d = 0; d < dim_; d += kDims) {
      Floats keys[kTiles];
      for (int t = 0; t < kTiles; t++) keys[t] = Number<kFloat32>::load(key_tiles_[tile + t] + d * kTileSlots);
      for (int r = 0; r < kRows; r++) {
        Floats query;
        if constexpr (kDims == 1)
          query = broadcast(queries_[r * dim_ + d]);
        else
          query = load_floats(queries_ + (r * dim_ + d) * kTileSlots);
        for (int t = 0; t < kTiles; t++) total[r][t] = multiply_add(query, keys[t], total[r][t]);
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int t = 0; t < kTiles; t++) {
        float lanes[kLanes];
        store(lanes, total[r][t]);
        float* to = row_scores(r) + (tile + t) * kTileSlots;
        for (int i = 0; i < kTileSlots; i++) to[i] = kDims == 1 ? lanes[i] : lanes[i] + lanes[(i + kTileSlots) % kLanes];
      }
  }

  // Scores to weights: e^(score - largest), 0 where the row may not look.
  Partial soften(int row, int64_t first_position, Span span) {
    float* scores = row_scores(row);
    if (softcap_ > 0)
      for (int64_t i = first_tile_ * kTileSlots; i < padded_tiles_ * kTileSlots; i += kLanes)
        store(scores + i, softcap_ * tanh(load_floats(scores + i) / softcap_));
    mask(scores, first_position, span);
    Floats largest = broadcast(kMasked);
    const int64_t begin = first_tile_ * kTileSlots, end = padded_tiles_ * kTileSlots;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats s = load_floats(scores + i);
      largest = s > largest ? s : largest;
    }
    const float peak = max_lanes(largest);
    Floats sum{};
    for (int64_t i = begin; i < end; i += kLanes) {
      const Floats weight = exponential(load_floats(scores + i) - peak);
      store(scores + i, weight);
      sum += weight;
    }
    return {peak, sum_lanes(sum)};
  }

  void mask(float* scores, int64_t first_position, Span span) const {
    const int64_t tiles = shape_.tiles();
    if (shape_.block_size % kTileSlots == 0) {  // slot i has position first_position + i
      const int64_t first = std::max<int64_t>(span.first - first_position, 0);
      const int64_t last = std::max<int64_t>(span.last - first_position, 0);
      for (int64_t i = first_tile_ * kTileSlots; i < std::min(first, padded_tiles_ * kTileSlots); i++) scores[i] = kMasked;
      for (int64_t i = last; i < padded_tiles_ * kTileSlots; i++) scores[i] = kMasked;
      return;
    }
    for (int64_t i = first_tile_ * kTileSlots; i < padded_tiles_ * kTileSlots; i++) {
      const int64_t tile = i / kTileSlots, in_block = tile % tiles * kTileSlots + i % kTileSlots;
      const int64_t position = first_position + tile / tiles * shape_.block_size + in_block;
      if (in_block >= shape_.block_size || position < span.first || position >= span.last || tile >= num_tiles_)
        scores[i] = kMasked;
    }
  }

  void weigh_all(float* out) const {
    switch (num_rows_) {
      case 1: return weigh_rows<1, 4>(out);
      case 2: return weigh_rows<2, 4>(out);
      case 3: return weigh_rows<3, 4>(out);
      case 4: return weigh_rows<4, 2>(out);
      case 5: return weigh_rows<5, 2>(out);
      default: return weigh_rows<6, 2>(out);
    }
  }

  template <int kRows, int kVectors>
  void weigh_rows(float* out) const {
    int64_t d = 0;
    for (; d + kVectors * kLanes <= dim_; d += kVectors * kLanes) weigh<kRows, kVectors>(d, out);
    for (; d < dim_; d += kLanes) weigh<kRows, 1>(d, out);
  }

  // out[row, d..] = sum over slots of weight * value. Slots that were never written are not touched: they may be NaN.
  template <int kRows, int kVectors>
  void weigh(int64_t d, float* out) const {
    Floats total[kRows][kVectors] = {};
    const int64_t tiles = shape_.tiles();
    for (int64_t tile = first_tile_; tile < num_tiles_; tile++) {
      const int64_t in_block = tile % tiles * kTileSlots;
      const int64_t slot = tile / tiles * shape_.block_size + in_block;
      const int64_t count = std::min<int64_t>({kTileSlots, shape_.block_size - in_block, last_slot_ - slot});
      const Type* values = values_[tile] + d;
      const float* weights = scores_ + tile * kTileSlots;
      const int64_t stride = row_scores(1) - scores_;
      for (int64_t i = 0; i < count; i++, values += dim_) {
        Floats v[kVectors];
        for (int j = 0; j < kVectors; j++) v[j] = Number<kFloat32>::load(values + j * kLanes);
        for (int r = 0; r < kRows; r++) {  // one weight at a time: all of them do not fit into registers with the sums
          const Floats weight = broadcast(weights[r * stride + i]);
          for (int j = 0; j < kVectors; j++) total[r][j] = multiply_add(weight, v[j], total[r][j]);
        }
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int j = 0; j < kVectors; j++) store(out + r * dim_ + d + j * kLanes, total[r][j]);
  }

  const Cache& cache_;
  const CacheShape& shape_;
  const float softcap_;
  const int64_t dim_;
  float* const scores_;
  float* const queries_;
  const Type** const key_tiles_;
  const Type** const values_;
  int num_rows_ = 0;
  int64_t first_tile_ = 0, num_tiles_ = 0, padded_tiles_ = 0, last_slot_ = 0;
};

// Adds a later partition to what the earlier ones gave.
inline void merge(Partial& total, float* out, const Partial& part, const float* part_out, int64_t dim) {
  const float largest = part.largest > total.largest ? part.largest : total.largest;
  const float old_factor = total.sum == 0 ? 0.0f : std::exp(total.largest - largest);
  const float new_factor = std::exp(part.largest - largest);
  for (int64_t d = 0; d < dim; d++) out[d] = out[d] * old_factor + part_out[d] * new_factor;
  total = {largest, total.sum * old_factor + part.sum * new_factor};
}

}  // namespace octavo
