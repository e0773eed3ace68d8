"""CompletionBoard: one monotonic counter per rank in shared memory: how many steps each rank has completed.

Each counter has one writer, its rank; rank 0 reads the minimum and never waits for it (I2).
"""

import mmap
from typing import Self

from workers.board_memory import MeetingStore, map_shared

_LINE_BYTES = 64
"""One counter per cache line: ranks do not slow each other."""
_WORDS_PER_LINE = _LINE_BYTES // 8


class CompletionBoard:
    """Counters of all ranks; a rank publishes only its own. Words are aligned and written whole."""

    def __init__(self, rank: int, size: int, memory: mmap.mmap | bytearray) -> None:
        self._rank = rank
        self._size = size
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")

    @classmethod
    def private(cls) -> Self:
        """Return the board of a group of one."""
        return cls(0, 1, bytearray(_LINE_BYTES))

    @classmethod
    def shared(cls, store: MeetingStore, rank: int, size: int) -> Self:
        """Map one board on all ranks.

        Raise OSError when a rank cannot open it: all ranks must run on one machine.
        """
        return cls(rank, size, map_shared(store, "board", rank, size, size * _LINE_BYTES))

    def publish(self, count: int) -> None:
        """Set this rank's counter; it never goes back."""
        place = self._rank * _WORDS_PER_LINE
        assert count >= self._words[place]
        self._words[place] = count

    def counts(self) -> list[int]:
        """Return every rank's counter as it stands in memory now."""
        return [self._words[rank * _WORDS_PER_LINE] for rank in range(self._size)]

    def minimum(self) -> int:
        """Return what every rank has completed."""
        return min(self.counts())

    def close(self) -> None:
        """Unmap the board. Idempotent."""
        self._words.release()
        self._bytes.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()
