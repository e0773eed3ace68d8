// Threads of torch's own OpenMP runtime. Its entry points are called directly and left undefined at link time:
// they resolve to the one libgomp that torch has loaded, so both share a thread pool and torch.set_num_threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);
}

// Runs body(thread, num_threads) on up to `max_threads` threads of the caller's team.
template <class Body>
static inline void parallel(int max_threads, Body&& body) {
  if (max_threads <= 1) {
    body(0, 1);
    return;
  }
  GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
                &body, unsigned(max_threads), 0);
}

static inline void barrier(int num_threads) {
  if (num_threads > 1) GOMP_barrier();
}

// Hands out [0, total) in chunks: a thread that the machine slows down takes fewer.
class Chunks {
 public:
  Chunks(int64_t total, int64_t chunk) : total_(total), chunk_(chunk < 1 ? 1 : chunk) {}

  bool take(int64_t* first, int64_t* stop) {
    *first = next_.fetch_add(chunk_, std::memory_order_relaxed);
    *stop = *first + chunk_ < total_ ? *first + chunk_ : total_;
    return *first < total_;
  }

 private:
  const int64_t total_, chunk_;
  std::atomic<int64_t> next_{0};
};

// Memory that a thread keeps between calls; grows, never shrinks. Aligned to 64 bytes.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  float* floats(int64_t num) {
    if (num > capacity_) {
      std::free(data_);
      capacity_ = (num + 15) / 16 * 16;
      data_ = std::aligned_alloc(64, size_t(capacity_) * sizeof(float));
      if (data_ == nullptr) std::abort();  // out of memory: torch would have thrown just the same
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};
