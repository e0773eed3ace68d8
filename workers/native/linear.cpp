// y = x W^T (+ bias) with bf16 weights, packed once; float32 accumulation, one FMA chain per output in the order
// of k: a row's result does not depend on how many rows there are.
//
// Packed weights: panels of COLUMNS output columns. A 32-bit word holds (W[n, 2p], W[n, 2p + 1]), the even one
// in its low half:
//   panel | pair p = 0: COLUMNS words | pair p = 1: COLUMNS words | ...            (K / 2 pairs, zero padded)
// so that one shift and one mask widen two k of a vector of columns, and CPUs with bf16 products take a word of
// both x and W as it is.

#include "simd.h"
#include "threads.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define EYRIE_PAIR_PRODUCTS 1
#endif

namespace {

constexpr int VECTORS = 2;
constexpr int COLUMNS = VECTORS * LANES;
constexpr int PREFETCH_WORDS = 512;
constexpr int64_t MAX_ROW_BLOCK_WORDS = 48 * 1024;  // of prepared x at a time: stays in the L2 cache

static_assert(sizeof(Words) == LANES * 4);

// What a row of x is made into for the tiles, once per call: float32 for each k, or a word for each pair of k.
template <class In>
struct Prepared {
  using Value = float;
  static constexpr int64_t PER_PAIR = 2;
};

#if defined(EYRIE_PAIR_PRODUCTS)
template <>
struct Prepared<bf16> {
  using Value = uint32_t;
  static constexpr int64_t PER_PAIR = 1;
};

// sum + even x * even w + odd x * odd w in every lane.
inline Floats add_pair_products(Floats sum, uint32_t x, Words w) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)w);
#else  // to test the layout on other CPUs
  const float even = bits_of<float>(x << 16), odd = bits_of<float>(x & 0xFFFF0000u);
  return sum + even * (Floats)(w << 16) + odd * (Floats)(w & 0xFFFF0000u);
#endif
}
#endif

inline Floats even_of(Words pair) { return (Floats)(pair << 16); }
inline Floats odd_of(Words pair) { return (Floats)(pair & 0xFFFF0000u); }

template <class Out>
void store_columns(Out* to, Floats value, int64_t columns, const float* bias) {
  if (columns >= LANES) {
    store(to, bias ? value + load(bias) : value);
    return;
  }
  float lanes[LANES];
  store(lanes, value);
  for (int64_t i = 0; i < columns; ++i) narrow(to + i, bias ? lanes[i] + bias[i] : lanes[i]);
}

inline Words words_at(const uint32_t* words, int64_t panel_words, int vector) {
  const uint32_t* from = words + (vector / VECTORS) * panel_words + (vector % VECTORS) * LANES;
  return load_words(from);
}

// Makes loads through `pointer` wait, in the compiler's eyes, for `value`: it would hoist the loads of the odd
// half above the products of the even one, and spill the sums to make room.
template <class Pointer>
inline void follow(Pointer& pointer, const Floats& value) {
#if defined(__x86_64__)
  asm volatile("" : "+r"(pointer) : "x"(value));
#else
  asm volatile("" : "+r"(pointer) : "w"(value));
#endif
}

template <int ROWS, int NUM>
inline void add_products(Floats (&sums)[ROWS][NUM], const float* x, int64_t x_stride, const Floats (&weights)[NUM]) {
  for (int i = 0; i < ROWS; ++i) {
    const float value = x[i * x_stride];
    for (int j = 0; j < NUM; ++j) sums[i][j] += value * weights[j];
  }
}

// ROWS rows of x times PANELS panels. ROWS * PANELS * VECTORS accumulators stay in registers.
template <int ROWS, int PANELS>
inline void sum_pairs(Floats (&sums)[ROWS][PANELS * VECTORS], const float* x, int64_t x_stride,
                      const uint32_t* panel, int64_t pairs) {
  const int64_t panel_words = pairs * COLUMNS;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint32_t* words = panel + p * COLUMNS;
    const float* values = x + 2 * p;
    if (ROWS == 1)
      for (int j = 0; j < PANELS; ++j) __builtin_prefetch(words + j * panel_words + PREFETCH_WORDS);
    Floats weights[PANELS * VECTORS];
    for (int j = 0; j < PANELS * VECTORS; ++j) weights[j] = even_of(words_at(words, panel_words, j));
    add_products(sums, values, x_stride, weights);
    follow(words, sums[ROWS - 1][0]);
    follow(values, sums[ROWS - 1][0]);
    for (int j = 0; j < PANELS * VECTORS; ++j) weights[j] = odd_of(words_at(words, panel_words, j));
    add_products(sums, values + 1, x_stride, weights);
  }
}

#if defined(EYRIE_PAIR_PRODUCTS)
template <int ROWS, int PANELS>
inline void sum_pairs(Floats (&sums)[ROWS][PANELS * VECTORS], const uint32_t* x, int64_t x_stride,
                      const uint32_t* panel, int64_t pairs) {
  const int64_t panel_words = pairs * COLUMNS;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint32_t* words = panel + p * COLUMNS;
    if (ROWS == 1)
      for (int j = 0; j < PANELS; ++j) __builtin_prefetch(words + j * panel_words + PREFETCH_WORDS);
    for (int j = 0; j < PANELS * VECTORS; ++j) {
      const Words pair = words_at(words, panel_words, j);
      for (int i = 0; i < ROWS; ++i) sums[i][j] = add_pair_products(sums[i][j], x[i * x_stride + p], pair);
    }
  }
}
#endif

template <int ROWS, int PANELS, class Value, class Out>
void tile(const Value* x, int64_t x_stride, const uint32_t* panel, int64_t pairs, int64_t columns,
          const float* bias, Out* out, int64_t out_stride) {
  Floats sums[ROWS][PANELS * VECTORS] = {};
  sum_pairs<ROWS, PANELS>(sums, x, x_stride, panel, pairs);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS * VECTORS; ++j) {
      const int64_t first = j * LANES;
      if (first < columns)
        store_columns(out + i * out_stride + first, sums[i][j], columns - first, bias ? bias + first : nullptr);
    }
}

#if defined(EYRIE_PAIR_PRODUCTS)
void prepare_rows(const bf16* x, int64_t x_stride, int64_t rows, int64_t k, uint32_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    if (k & 1) to[i * to_stride + k / 2] = 0;
    std::memcpy(to + i * to_stride, x + i * x_stride, size_t(k) * sizeof(bf16));
  }
}
#endif

template <class In>
void prepare_rows(const In* x, int64_t x_stride, int64_t rows, int64_t k, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const In* from = x + i * x_stride;
    float* row = to + i * to_stride;
    int64_t j = 0;
    for (; j + LANES <= k; j += LANES) store(row + j, load(from + j));
    for (; j < k; ++j) row[j] = widen(from[j]);
    for (; j < k + (k & 1); ++j) row[j] = 0.0f;
  }
}

template <class Value, class Out>
struct Product {
  const Value* x;
  int64_t x_stride, rows;
  const uint32_t* packed;
  int64_t n, pairs;
  const float* bias;
  Out* out;
  int64_t out_stride;

  template <int ROWS, int PANELS>
  void rows_at(int64_t row, int64_t panel) const {
    const int64_t first = panel * COLUMNS;
    tile<ROWS, PANELS>(x + row * x_stride, x_stride, packed + panel * pairs * COLUMNS, pairs, n - first,
                       bias ? bias + first : nullptr, out + row * out_stride + first, out_stride);
  }

  // All rows times the panels [first, stop).
  void panels(int64_t first, int64_t stop) const {
    if (rows == 1) {
      for (; first + 4 <= stop; first += 4) rows_at<1, 4>(0, first);
      for (; first < stop; ++first) rows_at<1, 1>(0, first);
      return;
    }
    if (rows == 2)
      for (; first + 2 <= stop; first += 2) rows_at<2, 2>(0, first);
    for (; first < stop; ++first) {
      int64_t row = 0;
      // 4 + 4 rather than 6 + 2, 3 + 2 rather than 4 + 1: few rows a tile leave the FMA units waiting.
      for (; rows - row >= 9 || rows - row == 6; row += 6) rows_at<6, 1>(row, first);
      for (; rows - row >= 6 || rows - row == 4; row += 4) rows_at<4, 1>(row, first);
      if (rows - row == 5 || rows - row == 3) rows_at<3, 1>(row, first), row += 3;
      if (rows - row == 2) rows_at<2, 1>(row, first), row += 2;
      if (rows - row == 1) rows_at<1, 1>(row, first);
    }
  }
};

template <class In, class Out>
void linear(const In* x, int64_t x_stride, int64_t rows, const uint32_t* packed, int64_t n, int64_t k,
            const float* bias, Out* out, int64_t out_stride) {
  static thread_local Scratch scratch;
  const int64_t pairs = (k + 1) / 2;
  using Value = typename Prepared<In>::Value;
  static_assert(sizeof(Value) == sizeof(float));
  // + 16: rows a power of two apart would share cache sets
  const int64_t stride = pairs * Prepared<In>::PER_PAIR + 16;
  int64_t block = MAX_ROW_BLOCK_WORDS / stride / 12 * 12;
  if (block < 12) block = 12;
  if (block > rows) block = rows;
  Value* prepared = reinterpret_cast<Value*>(scratch.floats(block * stride));
  const int64_t num_panels = (n + COLUMNS - 1) / COLUMNS;
  const int max_threads = omp_get_max_threads();
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t here = first + block < rows ? block : rows - first;
    const Product<Value, Out> product{prepared, stride, here,       packed, n, pairs, bias, out + first * out_stride,
                                      out_stride};
    // A panel is 4 * COLUMNS * pairs bytes: small chunks balance, whole quads feed the one-row tile.
    int64_t chunk = num_panels / (max_threads * 8) / 4 * 4;
    Chunks chunks(num_panels, chunk < 4 ? (rows <= 2 ? 4 : 1) : chunk);
    const bool is_small = here * k <= 2048;
    if (is_small) prepare_rows(x + first * x_stride, x_stride, here, k, prepared, stride);
    parallel(max_threads, [&](int thread, int num_threads) {
      if (!is_small) {
        const int64_t share = (here + num_threads - 1) / num_threads;
        const int64_t row = thread * share, stop = row + share < here ? row + share : here;
        if (row < stop)
          prepare_rows(x + (first + row) * x_stride, x_stride, stop - row, k, prepared + row * stride, stride);
        barrier(num_threads);
      }
      int64_t panel, last;
      while (chunks.take(&panel, &last)) product.panels(panel, last);
    });
  }
}

}  // namespace

extern "C" {

// Words that eyrie_pack_linear writes for a weight [n, k].
int64_t eyrie_packed_words(int64_t n, int64_t k) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS * ((k + 1) / 2); }

// weight: bf16 [n, k], rows `stride` elements apart.
void eyrie_pack_linear(const void* weight, int64_t stride, int64_t n, int64_t k, uint32_t* packed) {
  const bf16* from = static_cast<const bf16*>(weight);
  const int64_t pairs = (k + 1) / 2;
  Chunks chunks((n + COLUMNS - 1) / COLUMNS, 8);
  parallel(omp_get_max_threads(), [&](int, int) {
    int64_t panel, last;
    while (chunks.take(&panel, &last))
      for (; panel < last; ++panel)
        for (int64_t p = 0; p < pairs; ++p)
          for (int64_t j = 0; j < COLUMNS; ++j) {
            const int64_t row = panel * COLUMNS + j;
            uint32_t even = 0, odd = 0;
            if (row < n) {
              even = from[row * stride + 2 * p].bits;
              if (2 * p + 1 < k) odd = from[row * stride + 2 * p + 1].bits;
            }
            packed[(panel * pairs + p) * COLUMNS + j] = even | odd << 16;
          }
  });
}

// x [rows, k] and out [rows, n] of the dtypes given, rows their stride (elements) apart; bias float32 [n] or null.
void eyrie_linear(const void* x, int32_t x_dtype, int64_t x_stride, int64_t rows, const uint32_t* packed, int64_t n,
                  int64_t k, const float* bias, void* out, int32_t out_dtype, int64_t out_stride) {
  if (x_dtype == BFLOAT16 && out_dtype == BFLOAT16)
    linear(static_cast<const bf16*>(x), x_stride, rows, packed, n, k, bias, static_cast<bf16*>(out), out_stride);
  else if (x_dtype == BFLOAT16)
    linear(static_cast<const bf16*>(x), x_stride, rows, packed, n, k, bias, static_cast<float*>(out), out_stride);
  else if (out_dtype == BFLOAT16)
    linear(static_cast<const float*>(x), x_stride, rows, packed, n, k, bias, static_cast<bf16*>(out), out_stride);
  else
    linear(static_cast<const float*>(x), x_stride, rows, packed, n, k, bias, static_cast<float*>(out), out_stride);
}
}
