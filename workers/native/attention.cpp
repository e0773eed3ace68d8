// Paged attention over a page-major pool: writes a step's K and V, then attends; decode and extend rows mixed.
//
// Work is cut into tasks: the queries [first_query, stop_query) of one row over the keys [first_key, stop_key) of
// its context, times a range of KV heads: all where decode rows are many, so that memory is read in order, else
// one. Tasks over parts of a context leave (maximum, weight, unscaled output) behind, which a second pass joins.
// The cut of a context depends on the row alone, so its result does not depend on its neighbours.
// Only keys that some query of the task may see are read: what lies outside can be NaN.

#include <algorithm>

#include "attention_block.h"
#include "threads.h"

namespace {

constexpr int64_t KEYS_PER_TASK = 512;
constexpr int64_t QUERIES_PER_TASK = 16;

struct Task {
  int64_t row, first_query, stop_query, first_key, stop_key, partial;
  bool is_whole;
};

}  // namespace

extern "C" {

// One step's batch; mirrors workers.native.kernels.AttentionBatch. Pointers are to int32 up to `locations`.
struct AttentionBatch {
  const int32_t* page_rows;  // [num_rows, page_rows_stride]
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int64_t* locations;
  int64_t page_rows_stride, num_rows, num_tokens, page_size;
  const int64_t* visible;    // null unless rows end in trees: TokenTree's, as num_before is
  const int64_t* positions;  // of texts, which windows count; elsewhere they are places
  int64_t num_before;
};

// One layer and its part of the pool; mirrors workers.native.kernels.AttentionShape. Strides in elements;
// sliding_window 0: none.
struct AttentionShape {
  void* pool_k;
  void* pool_v;
  int64_t page_stride, token_stride;
  int64_t num_heads, num_kv_heads, head_dim, sliding_window;
  float scale;
  int32_t dtype;
};
}

namespace {

template <class T>
struct Attention {
  using Block = typename BlockMath<T>::Block;

  const AttentionBatch& batch;
  const AttentionShape& shape;
  const T* q;
  const T* k;
  const T* v;
  int64_t q_stride, k_stride, v_stride;
  T* out;
  float* partials;
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  const BlockMath<T> math{shape.head_dim};
  const int64_t dim = math.dim, padded_dim = math.padded_dim;
  const int64_t partial_floats = QUERIES_PER_TASK * group * (padded_dim + 2);

  // Finds the block at `first`. 64 bits throughout: page * page_stride passes 2^32 on real pools.
  void find(const Task& task, int64_t first_head, int64_t first, Block& block) const {
    block.num = first + KEYS_PER_BLOCK < task.stop_key ? KEYS_PER_BLOCK : task.stop_key - first;
    const int32_t* pages = batch.page_rows + task.row * batch.page_rows_stride + first / batch.page_size;
    int64_t offset = first % batch.page_size;
    for (int64_t t = 0; t < block.num; ++t, ++offset) {
      if (offset == batch.page_size) ++pages, offset = 0;
      const int64_t place = *pages * shape.page_stride + offset * shape.token_stride + first_head * dim;
      block.keys[t] = static_cast<const T*>(shape.pool_k) + place;
      block.values[t] = static_cast<const T*>(shape.pool_v) + place;
    }
  }

  void write(int64_t first, int64_t stop) const {
    const size_t bytes = size_t(shape.num_kv_heads * dim) * sizeof(T);
    for (int64_t token = first; token < stop; ++token) {
      const int64_t location = batch.locations[token];
      const int64_t place =
          location / batch.page_size * shape.page_stride + location % batch.page_size * shape.token_stride;
      std::memcpy(static_cast<T*>(shape.pool_k) + place, k + token * k_stride, bytes);
      std::memcpy(static_cast<T*>(shape.pool_v) + place, v + token * v_stride, bytes);
    }
  }

  int64_t query_len(int64_t row) const { return batch.query_starts[row + 1] - batch.query_starts[row]; }
  int64_t first_place(int64_t row) const { return batch.context_lens[row] - query_len(row); }

  // Where query `query` of a row is in its text: never behind its place.
  int64_t position(int64_t row, int64_t query) const {
    return batch.visible ? batch.positions[batch.query_starts[row] + query] : first_place(row) + query;
  }

  // The first place that some query in [first, stop) of a row sees: of a chain's the first one's.
  int64_t low_of(int64_t row, int64_t first, int64_t stop) const {
    int64_t lowest = low(position(row, first));
    for (int64_t query = first + 1; batch.visible && query < stop; ++query)
      lowest = std::min(lowest, low(position(row, query)));
    return lowest;
  }

  // Calls visit(task) for all tasks of the step, in an order that every thread sees alike.
  template <class Visit>
  void each_task(Visit&& visit) const {
    int64_t partial = 0;
    for (int64_t row = 0; row < batch.num_rows; ++row) {
      const int64_t len = query_len(row), place = first_place(row);
      for (int64_t first = 0; first < len; first += QUERIES_PER_TASK) {
        const int64_t stop = first + QUERIES_PER_TASK < len ? first + QUERIES_PER_TASK : len;
        const int64_t last_key = place + stop;
        int64_t first_key = low_of(row, first, stop);
        const bool is_whole = last_key - first_key <= KEYS_PER_TASK;
        for (; first_key < last_key; first_key += KEYS_PER_TASK) {
          const int64_t end = first_key + KEYS_PER_TASK < last_key ? first_key + KEYS_PER_TASK : last_key;
          visit(Task{row, first, stop, first_key, end, partial, is_whole});
          partial += is_whole ? 0 : 1;
        }
      }
    }
  }

  // The first position that a query at `position` sees.
  int64_t low(int64_t position) const {
    return shape.sliding_window > 0 && position + 1 > shape.sliding_window ? position + 1 - shape.sliding_window : 0;
  }

  // The scratch of one KV head: what is carried from block to block.
  struct Carried {
    float *wide_q, *sums;      // [rows, padded_dim]
    float *maxima, *weights;   // [rows]
  };

  bool has_few_rows(const Task& task) const {
    return (task.stop_query - task.first_query) * group <= BlockMath<T>::MAX_DOT_ROWS && padded_dim == dim;
  }

  // The task's outputs, by head of the group within query: sums of exp(score - maximum) * v over its keys.
  void attend(const Task& task, int64_t first_head, int64_t stop_head, Scratch& scratch) const {
    const int64_t rows = (task.stop_query - task.first_query) * group;
    const int64_t carried_floats = rows * (2 * padded_dim + 2), block_floats = KEYS_PER_BLOCK * padded_dim;
    const int64_t all_carried_floats = (stop_head - first_head) * carried_floats;
    float* memory = scratch.floats(all_carried_floats + rows * KEYS_PER_BLOCK + 2 * block_floats);
    float* scores = memory + all_carried_floats;  // [rows, KEYS_PER_BLOCK]
    float* keys = scores + rows * KEYS_PER_BLOCK;  // [padded_dim, KEYS_PER_BLOCK]
    float* values = keys + block_floats;           // [KEYS_PER_BLOCK, padded_dim]
    const auto carried_of = [&](int64_t head) {
      float* own = memory + (head - first_head) * carried_floats;
      return Carried{own, own + rows * padded_dim, own + 2 * rows * padded_dim, own + 2 * rows * padded_dim + rows};
    };
    for (int64_t head = first_head; head < stop_head; ++head) {
      const Carried own = carried_of(head);
      widen_queries(task, head, own.wide_q);
      for (int64_t i = 0; i < rows * padded_dim; ++i) own.sums[i] = 0.0f;
      for (int64_t i = 0; i < rows; ++i) own.maxima[i] = NO_SCORE, own.weights[i] = 0.0f;
    }
    for (int64_t first = task.first_key; first < task.stop_key; first += KEYS_PER_BLOCK) {
      Block block;
      find(task, first_head, first, block);
      math.fetch(block, stop_head - first_head);
      for (int64_t head = first_head; head < stop_head; ++head) {
        attend_block(task, first, block, carried_of(head), rows, scores, keys, values);
        for (int64_t t = 0; t < block.num; ++t) block.keys[t] += dim, block.values[t] += dim;
      }
    }
    for (int64_t head = first_head; head < stop_head; ++head) {
      const Carried own = carried_of(head);
      finish(task, head, rows, own.maxima, own.weights, own.sums);
    }
  }

  void attend_block(const Task& task, int64_t first, const Block& block, const Carried& own, int64_t rows,
                    float* scores, float* keys, float* values) const {
    const bool is_few = has_few_rows(task);
    if (is_few) {
      math.dot_scores(block, own.wide_q, rows, scores);
    } else {
      math.tile_scores(block, own.wide_q, rows, keys, scores);
      math.widen_values(block, values);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t query = task.first_query + i / group, place = first_place(task.row) + query;
      if (batch.visible) hide(task.row, query, first, block.num, scores + i * KEYS_PER_BLOCK);
      math.soften(scores + i * KEYS_PER_BLOCK, low(position(task.row, query)) - first, place + 1 - first, block.num,
                  &own.maxima[i], &own.weights[i], own.sums + i * padded_dim);
    }
    if (is_few)
      math.add_values(scores, rows, [&](int64_t t, int64_t d) { return load(block.values[t] + d); }, block.num,
                      own.sums);
    else
      math.add_values(scores, rows, [&](int64_t t, int64_t d) { return load(values + t * padded_dim + d); }, block.num,
                      own.sums);
  }

  // Takes away the scores of what a tree's query does not see of its row's numbers; block of keys `first` ...
  void hide(int64_t row, int64_t query, int64_t first, int64_t num, float* scores) const {
    const uint64_t visible = batch.visible[batch.query_starts[row] + query];
    const int64_t first_number = first_place(row) - batch.num_before;
    for (int64_t t = std::max<int64_t>(first_number - first, 0); t < num; ++t) {
      const int64_t number = first + t - first_number;
      if (number >= 64 || !(visible >> number & 1)) scores[t] = NO_SCORE;
    }
  }

  void widen_queries(const Task& task, int64_t kv_head, float* to) const {
    const int64_t token = batch.query_starts[task.row] + task.first_query;
    for (int64_t i = 0; i < (task.stop_query - task.first_query) * group; ++i, to += padded_dim) {
      const T* from = q + (token + i / group) * q_stride + (kv_head * group + i % group) * dim;
      for (int64_t d = 0; d < padded_dim; ++d) to[d] = d < dim ? widen(from[d]) * shape.scale : 0.0f;
    }
  }

  float* partial_of(const Task& task, int64_t kv_head) const {
    return partials + (task.partial * shape.num_kv_heads + kv_head) * partial_floats;
  }

  void finish(const Task& task, int64_t kv_head, int64_t rows, const float* maxima, const float* weights,
              const float* sums) const {
    if (task.is_whole) {
      for (int64_t i = 0; i < rows; ++i) write_out(task, kv_head, i, sums + i * padded_dim, weights[i]);
      return;
    }
    float* to = partial_of(task, kv_head);  // per row: maximum, weight, sums
    for (int64_t i = 0; i < rows; ++i, to += padded_dim + 2) {
      to[0] = maxima[i];
      to[1] = weights[i];
      std::memcpy(to + 2, sums + i * padded_dim, size_t(padded_dim) * sizeof(float));
    }
  }

  void write_out(const Task& task, int64_t kv_head, int64_t i, const float* sums, float weight) const {
    const int64_t token = batch.query_starts[task.row] + task.first_query + i / group;
    T* to = out + token * shape.num_heads * dim + (kv_head * group + i % group) * dim;
    const float factor = 1.0f / weight;
    for (int64_t d = 0; d < dim; ++d) narrow(to + d, sums[d] * factor);
  }

  // Joins the parts of one task's context: `first` is the first of `num` consecutive partials.
  void join(const Task& first, int64_t num, int64_t kv_head, Scratch& scratch) const {
    float* sums = scratch.floats(padded_dim);
    for (int64_t i = 0; i < (first.stop_query - first.first_query) * group; ++i) {
      const int64_t part_stride = shape.num_kv_heads * partial_floats;
      const float* part = partial_of(first, kv_head) + i * (padded_dim + 2);
      float maximum = NO_SCORE, weight = 0.0f;
      for (int64_t n = 0; n < num; ++n)
        if (!(part[n * part_stride] <= maximum)) maximum = part[n * part_stride];
      for (int64_t d = 0; d < padded_dim; ++d) sums[d] = 0.0f;
      for (int64_t n = 0; n < num; ++n) {
        const float* from = part + n * part_stride;
        if (from[0] == NO_SCORE) continue;  // a window ended before this part
        const float ratio = std::exp(from[0] - maximum);
        weight += from[1] * ratio;
        for (int64_t d = 0; d < padded_dim; ++d) sums[d] += from[2 + d] * ratio;
      }
      write_out(first, kv_head, i, sums, weight);
    }
  }

  // Calls visit(task, first_head, stop_head): `num_heads` at once for few rows, one for many, which keep a
  // block's keys and values busy for longer than they take to fetch.
  template <class Visit>
  void each_unit(int64_t num_heads, Visit&& visit) const {
    each_task([&](const Task& task) {
      const int64_t step = has_few_rows(task) ? num_heads : 1;
      for (int64_t head = 0; head < shape.num_kv_heads; head += step) visit(task, head, head + step);
    });
  }

  void run(Scratch& shared) {
    int64_t num_few = 0, num_partials = 0;
    each_task([&](const Task& task) { num_few += has_few_rows(task), num_partials += !task.is_whole; });
    partials = num_partials ? shared.floats(num_partials * shape.num_kv_heads * partial_floats) : nullptr;
    const int max_threads = omp_get_max_threads();
    const int64_t num_heads = num_few >= 2 * max_threads ? shape.num_kv_heads : 1;
    int64_t num_units = 0;
    each_unit(num_heads, [&](const Task&, int64_t, int64_t) { num_units += 1; });
    Chunks chunks(num_units, 1);
    parallel(max_threads, [&](int thread, int num_threads) {
      static thread_local Scratch scratch;
      const int64_t share = (batch.num_tokens + num_threads - 1) / num_threads;
      const int64_t end = (thread + 1) * share < batch.num_tokens ? (thread + 1) * share : batch.num_tokens;
      write(thread * share, end);
      barrier(num_threads);
      int64_t taken, stop, index = 0;
      bool has_more = chunks.take(&taken, &stop);
      each_unit(num_heads, [&](const Task& task, int64_t first_head, int64_t stop_head) {
        if (has_more && index == taken) {
          attend(task, first_head, stop_head, scratch);
          has_more = chunks.take(&taken, &stop);
        }
        index += 1;
      });
      if (num_partials == 0) return;
      barrier(num_threads);
      Task first{};
      int64_t parts = 0, joined = 0;
      each_task([&](const Task& task) {
        if (task.is_whole) return;
        if (parts == 0) first = task;
        parts += 1;
        if (task.stop_key < first_place(task.row) + task.stop_query) return;
        for (int64_t head = 0; head < shape.num_kv_heads; ++head)
          if (joined++ % num_threads == thread) join(first, parts, head, scratch);
        parts = 0;
      });
    });
  }
};

template <class T>
void attention(const AttentionBatch& batch, const AttentionShape& shape, const void* q, int64_t q_stride, const void* k,
               int64_t k_stride, const void* v, int64_t v_stride, void* out) {
  static thread_local Scratch shared;
  Attention<T>{batch, shape, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride,
               k_stride, v_stride, static_cast<T*>(out), nullptr}
      .run(shared);
}

template <class T>
void write_kv(const AttentionBatch& batch, const AttentionShape& shape, const void* k, int64_t k_stride, const void* v,
              int64_t v_stride) {
  Attention<T>{batch, shape, nullptr, static_cast<const T*>(k), static_cast<const T*>(v), 0, k_stride, v_stride,
               nullptr, nullptr}
      .write(0, batch.num_tokens);
}

}  // namespace

extern "C" {

// q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]: tokens their stride (elements) apart, each
// token's heads contiguous; out [tokens, heads * head_dim] contiguous. All of the pool's dtype.
void eyrie_attention(const AttentionBatch* batch, const AttentionShape* shape, const void* q, int64_t q_stride,
                     const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* out) {
  if (shape->dtype == BFLOAT16)
    attention<bf16>(*batch, *shape, q, q_stride, k, k_stride, v, v_stride, out);
  else
    attention<float>(*batch, *shape, q, q_stride, k, k_stride, v, v_stride, out);
}

// Writes k and v alone, as eyrie_attention does before it attends.
void eyrie_write_kv(const AttentionBatch* batch, const AttentionShape* shape, const void* k, int64_t k_stride,
                    const void* v, int64_t v_stride) {
  if (shape->dtype == BFLOAT16)
    write_kv<bf16>(*batch, *shape, k, k_stride, v, v_stride);
  else
    write_kv<float>(*batch, *shape, k, k_stride, v, v_stride);
}
}
