// Dekker's pattern as the lease protocol uses it, at full speed: one evictor, two readers, each its own process.
// In a round everybody meets, then goes over the same slots: sets its own mark on one, runs `fence`, reads the
// others' marks there. A slot is lost when the evictor saw no lease although a reader saw no mark: it would be
// given away under its reader.
#include <atomic>
#include <cstdint>
#include <sched.h>

namespace {

constexpr uint64_t NUM_PARTIES = 3;
constexpr uint64_t NUM_SLOTS = 1024;

// One cache line a word, as slot headers and lease rows are apart.
struct alignas(64) Word {
    std::atomic<uint64_t> value;
};

struct Board {
    Word arrived;                         // parties that reached a meeting, over all rounds
    Word lost;                            // slots lost
    Word marks[NUM_PARTIES][NUM_SLOTS];   // the last round in which a party marked a slot
    Word saw_none[NUM_PARTIES][NUM_SLOTS]; // the last round in which a party saw no other's mark
};

void meet(Board &board, uint64_t meetings) {
    board.arrived.value.fetch_add(1);
    for (int spins = 0; board.arrived.value.load() < meetings * NUM_PARTIES; ++spins) {
        if (spins > 1000) {
            sched_yield();
        }
    }
}

bool is_marked(const Board &board, uint64_t party, uint64_t slot, uint64_t round) {
    return board.marks[party][slot].value.load(std::memory_order_relaxed) == round;
}

} // namespace

extern "C" uint64_t board_bytes() { return sizeof(Board); }

extern "C" uint64_t num_lost(const Board *board) { return board->lost.value.load(); }

// Play `rounds` as party 0, the evictor, or 1 or 2, the readers. `fence` may be null.
extern "C" void play(Board *board, uint64_t party, uint64_t rounds, void (*fence)()) {
    for (uint64_t round = 1; round <= rounds; ++round) {
        meet(*board, 2 * round - 1);
        for (uint64_t step = 0; step < NUM_SLOTS; ++step) {
            // In opposite directions: whoever runs at the same time meets at some slot.
            const uint64_t slot = party == 0 ? step : NUM_SLOTS - 1 - step;
            board->marks[party][slot].value.store(round, std::memory_order_relaxed);
            if (fence != nullptr) {
                fence();
            }
            const bool sees = party == 0 ? is_marked(*board, 1, slot, round) || is_marked(*board, 2, slot, round)
                                         : is_marked(*board, 0, slot, round);
            if (!sees) {
                board->saw_none[party][slot].value.store(round, std::memory_order_relaxed);
            }
        }
        meet(*board, 2 * round);
        for (uint64_t slot = 0; party == 0 && slot < NUM_SLOTS; ++slot) {
            const auto saw_none = [&](uint64_t who) { return board->saw_none[who][slot].value.load() == round; };
            if (saw_none(0) && (saw_none(1) || saw_none(2))) {
                board->lost.value.fetch_add(1);
            }
        }
    }
}
