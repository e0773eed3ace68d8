// What lies between a decoder layer's products: RMSNorm with its residual sum, rotary embedding, gated SiLU.
// All compute in float32 and round once. Small inputs stay on the calling thread: waking others costs more.

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 8192;

// Calls body(row) for all rows, divided among threads where `elements` in all are worth it.
template <class Body>
void each_row(int64_t rows, int64_t elements, Body&& body) {
  int64_t threads = elements / MIN_ELEMENTS_PER_THREAD;
  if (threads > omp_get_max_threads()) threads = omp_get_max_threads();
  parallel(int(threads), [&](int thread, int num_threads) {
    for (int64_t row = rows * thread / num_threads; row < rows * (thread + 1) / num_threads; ++row) body(row);
  });
}

template <class T>
float rms_scale(const T* x, int64_t size, float eps) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    const Floats value = load(x + i);
    squares += value * value;
  }
  float total = sum_lanes(squares);
  for (; i < size; ++i) total += widen(x[i]) * widen(x[i]);
  return 1.0f / std::sqrt(total / float(size) + eps);
}

template <class T>
void scale_row(const T* x, float scale, const T* weight, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < size; ++i) narrow(out + i, widen(x[i]) * scale * widen(weight[i]));
}

template <class T>
void rms_norm(const T* x, int64_t x_stride, const T* delta, int64_t delta_stride, T* sum, const T* weight, float eps,
              int64_t rows, int64_t size, T* out) {
  each_row(rows, rows * size, [=](int64_t row) {
    const T* from = x + row * x_stride;
    if (delta != nullptr) {
      T* to = sum + row * size;
      const T* more = delta + row * delta_stride;
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) store(to + i, load(from + i) + load(more + i));
      for (; i < size; ++i) narrow(to + i, widen(from[i]) + widen(more[i]));
      from = to;  // as rounded: what the next layer adds to is what was normalised
    }
    scale_row(from, rms_scale(from, size, eps), weight, size, out + row * size);
  });
}

template <class T>
void rotate(T* heads, int64_t token_stride, int64_t tokens, int64_t num_heads, int64_t dim, const T* cosines,
            const T* sines, int64_t table_stride) {
  const int64_t half = dim / 2;
  each_row(tokens, tokens * num_heads * dim, [=](int64_t token) {
    const T *cos = cosines + token * table_stride, *sin = sines + token * table_stride;
    for (int64_t head = 0; head < num_heads; ++head) {
      T* first = heads + token * token_stride + head * dim;
      T* second = first + half;
      int64_t i = 0;
      for (; i + LANES <= half; i += LANES) {
        const Floats a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
        store(first + i, a * c - b * s);
        store(second + i, b * c + a * s);
      }
      for (; i < half; ++i) {
        const float a = widen(first[i]), b = widen(second[i]), c = widen(cos[i]), s = widen(sin[i]);
        narrow(first + i, a * c - b * s);
        narrow(second + i, b * c + a * s);
      }
    }
  });
}

template <class T>
void silu_mul(const T* gate_up, int64_t stride, int64_t rows, int64_t size, T* out) {
  each_row(rows, 4 * rows * size, [=](int64_t row) {
    const T *gate = gate_up + row * stride, *up = gate + size;
    T* to = out + row * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const Floats g = load(gate + i);
      store(to + i, g / (1.0f + exp(-g)) * load(up + i));
    }
    for (; i < size; ++i) {
      const float g = widen(gate[i]);
      narrow(to + i, g / (1.0f + std::exp(-g)) * widen(up[i]));
    }
  });
}

}  // namespace

extern "C" {

// sum = x + delta (where there is a delta), out = sum / rms(sum) * weight; sum and out [rows, size] contiguous.
void eyrie_rms_norm(const void* x, int64_t x_stride, const void* delta, int64_t delta_stride, void* sum,
                    const void* weight, float eps, int64_t rows, int64_t size, void* out, int32_t dtype) {
  if (dtype == BFLOAT16)
    rms_norm(static_cast<const bf16*>(x), x_stride, static_cast<const bf16*>(delta), delta_stride,
             static_cast<bf16*>(sum), static_cast<const bf16*>(weight), eps, rows, size, static_cast<bf16*>(out));
  else
    rms_norm(static_cast<const float*>(x), x_stride, static_cast<const float*>(delta), delta_stride,
             static_cast<float*>(sum), static_cast<const float*>(weight), eps, rows, size, static_cast<float*>(out));
}

// In place: heads [tokens, num_heads, dim], tokens `token_stride` apart; cosines and sines [tokens, dim / 2].
void eyrie_rotate(void* heads, int64_t token_stride, int64_t tokens, int64_t num_heads, int64_t dim,
                  const void* cosines, const void* sines, int64_t table_stride, int32_t dtype) {
  if (dtype == BFLOAT16)
    rotate(static_cast<bf16*>(heads), token_stride, tokens, num_heads, dim, static_cast<const bf16*>(cosines),
           static_cast<const bf16*>(sines), table_stride);
  else
    rotate(static_cast<float*>(heads), token_stride, tokens, num_heads, dim, static_cast<const float*>(cosines),
           static_cast<const float*>(sines), table_stride);
}

// out [rows, size] = silu(gate) * up, where gate_up [rows, 2 * size] = [ gate | up ].
void eyrie_silu_mul(const void* gate_up, int64_t stride, int64_t rows, int64_t size, void* out, int32_t dtype) {
  if (dtype == BFLOAT16)
    silu_mul(static_cast<const bf16*>(gate_up), stride, rows, size, static_cast<bf16*>(out));
  else
    silu_mul(static_cast<const float*>(gate_up), stride, rows, size, static_cast<float*>(out));
}
}
