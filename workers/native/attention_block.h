// The arithmetic of attention over one block of keys of one KV head, for the queries (rows) of a task. Decode rows
// read keys and values where they lie in the pool; many rows share a widened copy.
#pragma once

#include "simd.h"

constexpr int64_t KEYS_PER_BLOCK = 32;
constexpr float NO_SCORE = -INFINITY;

template <class T>
struct BlockMath {
  const int64_t dim;
  const int64_t padded_dim = (dim + LANES - 1) / LANES * LANES;

  static constexpr int64_t ELEMENTS_PER_LINE = 64 / sizeof(T);
  static constexpr int64_t MAX_DOT_ROWS = 8;

  // A block of keys of one row and KV head, where they lie in the pool; heads of a token lie side by side.
  struct Block {
    int64_t num;
    const T* keys[KEYS_PER_BLOCK];
    const T* values[KEYS_PER_BLOCK];
  };

  // Touches each cache line of a block's heads in the order in which they lie in memory. The CPU sees streams and
  // fetches ahead; the arithmetic, head after head in strides, would wait for line after line (a third slower).
  void fetch(const Block& block, int64_t num_heads) const {
    uint32_t touched = 0;
    const auto touch = [&](const T* const(&tokens)[KEYS_PER_BLOCK]) {
      for (int64_t t = 0; t < block.num; ++t)
        for (int64_t d = 0; d < num_heads * dim; d += ELEMENTS_PER_LINE)
          touched += *reinterpret_cast<const uint8_t*>(tokens[t] + d);
    };
    touch(block.keys);
    touch(block.values);
    asm volatile("" : : "r"(touched));  // else the compiler sees that nobody needs it
  }

  // Few rows: dot products straight from the pool, vectors along the head's dimension, four keys at a time.
  void dot_scores(const Block& block, const float* wide_q, int64_t rows, float* scores) const {
    for (int64_t t = 0; t < block.num; t += 4) {
      const T* from[4];
      for (int64_t u = 0; u < 4; ++u) from[u] = block.keys[t + u < block.num ? t + u : block.num - 1];
      int64_t i = 0;
      for (; i + 3 <= rows; i += 3) dot_tile<3>(from, wide_q + i * padded_dim, scores + i * KEYS_PER_BLOCK + t);
      for (; i < rows; ++i) dot_tile<1>(from, wide_q + i * padded_dim, scores + i * KEYS_PER_BLOCK + t);
    }
  }

  template <int ROWS>
  void dot_tile(const T* const (&from)[4], const float* wide_q, float* scores) const {
    Floats dots[ROWS][4] = {};
    for (int64_t d = 0; d < dim; d += LANES)
      for (int u = 0; u < 4; ++u) {
        const Floats key = load(from[u] + d);
        for (int i = 0; i < ROWS; ++i) dots[i][u] += load(wide_q + i * padded_dim + d) * key;
      }
    for (int i = 0; i < ROWS; ++i) sum_lanes(dots[i], scores + i * KEYS_PER_BLOCK);
  }

  // Many rows: keys transposed to [padded_dim, KEYS_PER_BLOCK], then tiles of rows times vectors of keys.
  void tile_scores(const Block& block, const float* wide_q, int64_t rows, float* keys, float* scores) const {
    for (int64_t t = 0; t < KEYS_PER_BLOCK; ++t)
      for (int64_t d = 0; d < dim; ++d) keys[d * KEYS_PER_BLOCK + t] = t < block.num ? widen(block.keys[t][d]) : 0.0f;
    for (int64_t c = 0; c < KEYS_PER_BLOCK; c += 2 * LANES) {
      int64_t i = 0;
      for (; i + 4 <= rows; i += 4) score_tile<4>(wide_q + i * padded_dim, keys + c, scores + i * KEYS_PER_BLOCK + c);
      for (; i < rows; ++i) score_tile<1>(wide_q + i * padded_dim, keys + c, scores + i * KEYS_PER_BLOCK + c);
    }
  }

  template <int ROWS>
  void score_tile(const float* wide_q, const float* keys, float* scores) const {
    Floats dots[ROWS][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Floats low = load(keys + d * KEYS_PER_BLOCK), high = load(keys + d * KEYS_PER_BLOCK + LANES);
      for (int i = 0; i < ROWS; ++i) {
        const float value = wide_q[i * padded_dim + d];
        dots[i][0] += value * low;
        dots[i][1] += value * high;
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      store(scores + i * KEYS_PER_BLOCK, dots[i][0]);
      store(scores + i * KEYS_PER_BLOCK + LANES, dots[i][1]);
    }
  }

  void widen_values(const Block& block, float* values) const {
    for (int64_t t = 0; t < block.num; ++t) {
      const T* from = block.values[t];
      float* to = values + t * padded_dim;
      int64_t d = 0;
      for (; d + LANES <= dim; d += LANES) store(to + d, load(from + d));
      for (; d < padded_dim; ++d) to[d] = d < dim ? widen(from[d]) : 0.0f;
    }
  }

  // Turns one row's scores of a block into weights exp(score - maximum); keys outside [low, high) get none.
  // A larger maximum scales down what was summed before it (online softmax; Milakov and Gimelshein 2018).
  void soften(float* scores, int64_t low, int64_t high, int64_t num, float* maximum, float* weight,
              float* sums) const {
    if (low > 0 || high < KEYS_PER_BLOCK || num < KEYS_PER_BLOCK)
      for (int64_t t = 0; t < KEYS_PER_BLOCK; ++t)
        if (t < low || t >= high || t >= num) scores[t] = NO_SCORE;
    Floats most = load(scores);
    for (int64_t t = LANES; t < KEYS_PER_BLOCK; t += LANES) {
      const Floats next = load(scores + t);
      // Written so that a NaN score wins, and shows in the logits.
      most = select(next <= most, most, next);
    }
    const float found = max_lanes(most);
    if (found > *maximum || found != found) {
      if (*maximum != NO_SCORE) {
        const float ratio = std::exp(*maximum - found);
        *weight *= ratio;
        for (int64_t d = 0; d < padded_dim; d += LANES) store(sums + d, load(sums + d) * ratio);
      }
      *maximum = found;
    }
    if (*maximum == NO_SCORE) {  // nothing seen yet: exp(-inf + inf) would be NaN
      for (int64_t t = 0; t < KEYS_PER_BLOCK; ++t) scores[t] = 0.0f;
      return;
    }
    Floats total = {};
    for (int64_t t = 0; t < KEYS_PER_BLOCK; t += LANES) {
      const Floats score = load(scores + t);
      const Floats value = select(score == splat(NO_SCORE), Floats{}, exp(score - *maximum));
      total += value;
      store(scores + t, value);
    }
    *weight += sum_lanes(total);
  }

  // sums += weights times values; value(t, d) is the vector at d of the block's key t.
  template <class Value>
  void add_values(const float* weights, int64_t rows, Value&& value, int64_t num, float* sums) const {
    for (int64_t d = 0; d < padded_dim; d += 2 * LANES) {
      int64_t i = 0;
      if (d + 2 * LANES <= padded_dim) {
        for (; i + 4 <= rows; i += 4) value_tile<4, 2>(weights, value, i, d, num, sums);
        for (; i + 3 <= rows; i += 3) value_tile<3, 2>(weights, value, i, d, num, sums);
        for (; i < rows; ++i) value_tile<1, 2>(weights, value, i, d, num, sums);
      }
      for (; i < rows; ++i) value_tile<1, 1>(weights, value, i, d, num, sums);
    }
  }

  template <int ROWS, int VECTORS, class Value>
  void value_tile(const float* weights, Value&& value, int64_t first_row, int64_t d, int64_t num, float* sums) const {
    weights += first_row * KEYS_PER_BLOCK;
    sums += first_row * padded_dim + d;
    Floats totals[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) totals[i][j] = load(sums + i * padded_dim + j * LANES);
    for (int64_t t = 0; t < num; ++t)
      for (int j = 0; j < VECTORS; ++j) {
        const Floats from = value(t, d + j * LANES);
        for (int i = 0; i < ROWS; ++i) totals[i][j] += weights[i * KEYS_PER_BLOCK + t] * from;
      }
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) store(sums + i * padded_dim + j * LANES, totals[i][j]);
  }
};
