// XXH3-64 of many runs of bytes of one length at once, by threads of its own. The values are those of
// the xxhash package with a seed, for lengths above 240; the algorithm is published at github.com/Cyan4973/xxHash.
#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t SECRET_BYTES = 192, STRIPE = 64, CONSUMED = 8;
constexpr size_t STRIPES_PER_BLOCK = (SECRET_BYTES - STRIPE) / CONSUMED;
constexpr size_t BLOCK = STRIPE * STRIPES_PER_BLOCK;
constexpr size_t LAST_STRIPE_SECRET = SECRET_BYTES - STRIPE - 7, MERGE_SECRET = 11;

constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9,
                   PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;

constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

uint64_t read64(const uint8_t* place) {
    uint64_t word;
    std::memcpy(&word, place, sizeof word);
    return word;
}

struct Lanes {
    alignas(64) uint64_t at[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
};

// at[i ^ 1] += data[i]; at[i] += low32(data[i] ^ secret[i]) * high32(data[i] ^ secret[i])
void accumulate(Lanes& lanes, const uint8_t* data, const uint8_t* secret, size_t num_stripes) {
#if defined(__AVX512F__)
    __m512i sum = _mm512_load_si512(lanes.at);
    for (size_t stripe = 0; stripe < num_stripes; ++stripe) {
        const __m512i word = _mm512_loadu_si512(data + stripe * STRIPE);
        const __m512i mixed = _mm512_xor_si512(word, _mm512_loadu_si512(secret + stripe * CONSUMED));
        const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
        const __m512i swapped = _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
        sum = _mm512_add_epi64(_mm512_add_epi64(product, swapped), sum);
    }
    _mm512_store_si512(lanes.at, sum);
#elif defined(__AVX2__)
    __m256i* sums = reinterpret_cast<__m256i*>(lanes.at);
    __m256i first = _mm256_load_si256(sums), second = _mm256_load_si256(sums + 1);
    for (size_t stripe = 0; stripe < num_stripes; ++stripe) {
        const __m256i* words = reinterpret_cast<const __m256i*>(data + stripe * STRIPE);
        const __m256i* keys = reinterpret_cast<const __m256i*>(secret + stripe * CONSUMED);
        const auto step = [](__m256i word, __m256i key, __m256i sum) {
            const __m256i mixed = _mm256_xor_si256(word, key);
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            const __m256i swapped = _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));
            return _mm256_add_epi64(_mm256_add_epi64(product, swapped), sum);
        };
        first = step(_mm256_loadu_si256(words), _mm256_loadu_si256(keys), first);
        second = step(_mm256_loadu_si256(words + 1), _mm256_loadu_si256(keys + 1), second);
    }
    _mm256_store_si256(sums, first);
    _mm256_store_si256(sums + 1, second);
#else
    for (size_t stripe = 0; stripe < num_stripes; ++stripe)
        for (size_t lane = 0; lane < 8; ++lane) {
            const uint64_t word = read64(data + stripe * STRIPE + 8 * lane);
            const uint64_t mixed = word ^ read64(secret + stripe * CONSUMED + 8 * lane);
            lanes.at[lane ^ 1] += word;
            lanes.at[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32);
        }
#endif
}

void scramble(Lanes& lanes, const uint8_t* secret) {
    for (size_t lane = 0; lane < 8; ++lane) {
        uint64_t word = lanes.at[lane];
        word ^= word >> 47;
        word ^= read64(secret + 8 * lane);
        lanes.at[lane] = word * PRIME32_1;
    }
}

uint64_t folded_product(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t checksum(const uint8_t* data, size_t num_bytes, uint64_t seed) {
    uint8_t secret[SECRET_BYTES];
    for (size_t place = 0; place < SECRET_BYTES; place += 16) {
        const uint64_t low = read64(SECRET + place) + seed, high = read64(SECRET + place + 8) - seed;
        std::memcpy(secret + place, &low, sizeof low);
        std::memcpy(secret + place + 8, &high, sizeof high);
    }
    // | block | block | ... | whole stripes of the rest |    the last 64 bytes once more, at another secret
    Lanes lanes;
    const size_t num_blocks = (num_bytes - 1) / BLOCK;
    for (size_t block = 0; block < num_blocks; ++block) {
        accumulate(lanes, data + block * BLOCK, secret, STRIPES_PER_BLOCK);
        scramble(lanes, secret + SECRET_BYTES - STRIPE);
    }
    const size_t rest = num_bytes - 1 - num_blocks * BLOCK;
    accumulate(lanes, data + num_blocks * BLOCK, secret, rest / STRIPE);
    accumulate(lanes, data + num_bytes - STRIPE, secret + LAST_STRIPE_SECRET, 1);
    uint64_t sum = num_bytes * PRIME64_1;
    for (size_t pair = 0; pair < 4; ++pair) {
        const uint8_t* key = secret + MERGE_SECRET + 16 * pair;
        sum += folded_product(lanes.at[2 * pair] ^ read64(key), lanes.at[2 * pair + 1] ^ read64(key + 8));
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9;
    return sum ^ (sum >> 32);
}

// Bundles of one length to be read; whoever asked holds it until `Pool::take`.
struct Job {
    std::vector<uint64_t> addresses, seeds, sums;
    size_t num_bytes;
    size_t num_begun = 0, num_done = 0;  // under the pool's lock

    void read(size_t place) {
        sums[place] = checksum(reinterpret_cast<const uint8_t*>(addresses[place]), num_bytes, seeds[place]);
    }
};

// Threads that do jobs, the first first. Without threads a job is done by whoever brings it.
class Pool {
  public:
    explicit Pool(size_t num_threads) {
        for (size_t number = 0; number < num_threads; ++number) threads_.emplace_back([this] { work(); });
    }

    // Jobs that nobody took are given up.
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(lock_);
            is_closing_ = true;
        }
        has_job_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    Job* begin(const uint64_t* addresses, const uint64_t* seeds, size_t num_bytes, size_t count) {
        auto made = std::make_unique<Job>();
        Job* job = made.get();
        job->addresses.assign(addresses, addresses + count);
        job->seeds.assign(seeds, seeds + count);
        job->sums.resize(count);
        job->num_bytes = num_bytes;
        if (threads_.empty()) {
            for (size_t place = 0; place < count; ++place) job->read(place);
            job->num_begun = job->num_done = count;
        }
        {
            std::lock_guard<std::mutex> lock(lock_);
            jobs_.push_back(std::move(made));
        }
        if (!threads_.empty()) has_job_.notify_all();
        return job;
    }

    bool is_done(const Job* job) {
        std::lock_guard<std::mutex> lock(lock_);
        return job->num_done == job->sums.size();
    }

    void wait(const Job* job) {
        std::unique_lock<std::mutex> lock(lock_);
        is_done_.wait(lock, [&] { return job->num_done == job->sums.size(); });
    }

    // Wait, tell the checksums, and forget the job.
    void take(const Job* job, uint64_t* sums) {
        wait(job);
        std::copy(job->sums.begin(), job->sums.end(), sums);
        std::lock_guard<std::mutex> lock(lock_);
        jobs_.erase(std::find_if(
            jobs_.begin(), jobs_.end(), [&](const std::unique_ptr<Job>& each) { return each.get() == job; }));
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(lock_);
        while (true) {
            Job* job = nullptr;
            has_job_.wait(lock, [&] { return is_closing_ || (job = next()) != nullptr; });
            if (is_closing_) return;
            const size_t place = job->num_begun++;
            lock.unlock();
            job->read(place);
            lock.lock();
            if (++job->num_done == job->sums.size()) is_done_.notify_all();
        }
    }

    Job* next() {
        for (const std::unique_ptr<Job>& job : jobs_)
            if (job->num_begun < job->sums.size()) return job.get();
        return nullptr;
    }

    std::mutex lock_;
    std::condition_variable has_job_, is_done_;
    std::deque<std::unique_ptr<Job>> jobs_;
    std::vector<std::thread> threads_;
    bool is_closing_ = false;
};

}  // namespace

extern "C" {

void* eyrie_checksums_open(size_t num_threads) { return new Pool(num_threads); }

void eyrie_checksums_close(void* pool) { delete static_cast<Pool*>(pool); }

void* eyrie_checksums_begin(
    void* pool, const uint64_t* addresses, const uint64_t* seeds, size_t num_bytes, size_t count) {
    return static_cast<Pool*>(pool)->begin(addresses, seeds, num_bytes, count);
}

bool eyrie_checksums_is_done(void* pool, void* job) {
    return static_cast<Pool*>(pool)->is_done(static_cast<Job*>(job));
}

void eyrie_checksums_wait(void* pool, void* job) { static_cast<Pool*>(pool)->wait(static_cast<Job*>(job)); }

void eyrie_checksums_take(void* pool, void* job, uint64_t* sums) {
    static_cast<Pool*>(pool)->take(static_cast<Job*>(job), sums);
}
}
