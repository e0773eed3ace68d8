// Vectors of the widest unit the compiler was told about (-march=native), and the two element types.
// GCC and Clang vector extensions: the same source for AVX-512, AVX2 and NEON. bf16 widens to float32 by a shift.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof(to));
  return to;
}

static inline Floats splat(float value) { return value - Floats{}; }

static inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static inline Words load_words(const uint32_t* from) {
  Words value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static inline Floats load(const bf16* from) {
  // GCC makes four instructions of the conversion where there is one.
#if defined(__AVX512F__)
  return (Floats)((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)) << 16);
#elif defined(__AVX2__)
  return (Floats)((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)) << 16);
#endif
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

static inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

// Rounds to the nearest, ties to even; NaN stays NaN (the sanitizer looks for it).
static inline void store(bf16* to, Floats value) {
  Words bits = (Words)value;
  Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  Words is_nan = (Words)(value != value);
  Halves halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

static inline float widen(float value) { return value; }
static inline float widen(bf16 value) { return bits_of<float>(uint32_t(value.bits) << 16); }

static inline void narrow(float* to, float value) { *to = value; }
static inline void narrow(bf16* to, float value) {
  uint32_t bits = bits_of<uint32_t>(value);
  to->bits = value != value ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline float sum_lanes(Floats value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// to[i] = the sum of the lanes of values[i].
static inline void sum_lanes(const Floats (&values)[4], float* to) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 halves[4];
  for (int i = 0; i < 4; ++i) {
    const __m512d whole = (__m512d)values[i];
    halves[i] = _mm256_add_ps((__m256)_mm512_castpd512_pd256(whole), (__m256)_mm512_extractf64x4_pd(whole, 1));
  }
#else
  const Floats(&halves)[4] = values;
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)halves[0], (__m256)halves[1]),
                                      _mm256_hadd_ps((__m256)halves[2], (__m256)halves[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum_lanes(values[i]);
#endif
}

static inline float max_lanes(Floats value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

static inline Floats select(Ints mask, Floats yes, Floats no) {
  return (Floats)(((Words)yes & (Words)mask) | ((Words)no & ~(Words)mask));
}

// exp by range reduction and a polynomial of degree 6 (Cephes expf, S. Moshier): within 2 units in the last
// place on [-87, 88]; 0 below, infinity above, NaN stays NaN.
static inline Floats exp(Floats x) {
  Floats clamped = select(x > splat(88.0f), splat(88.0f), x);
  clamped = select(clamped < splat(-87.0f), splat(-87.0f), clamped);
  Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats n = (clamped * 1.44269504088896341f + shifter) - shifter;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints exponent = __builtin_convertvector(n, Ints) + 127;
  Floats result = select(x > splat(88.0f), splat(INFINITY), p * (Floats)(exponent << 23));
  result = select(x < splat(-87.0f), Floats{}, result);
  return select(x != x, x, result);
}
