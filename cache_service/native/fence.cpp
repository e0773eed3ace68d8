// The full memory fence of the lease protocol: a store before it is seen by whoever's load after its own
// fence comes later (Dekker's pattern). Without one both sides may read what was there before.
#include <atomic>

extern "C" void eyrie_full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
