"""MoveBoard: what has become of each SAVE and LOAD on each rank of a TP group, in memory shared by them.

Each rank's PageMover writes its own row, from its threads; rank 0's decider and each rank's Engine read, and
nobody waits for anybody (I2). No torch.
"""

import mmap
from collections.abc import Iterable
from enum import IntEnum
from typing import Self

from workers.board_memory import MeetingStore, map_shared

MOVE_CAPACITY = 4096
"""Moves in flight at once, at most: a move's word is the one of the move so many before it."""
_STATUS_BITS = 8
_STATUS_MASK = (1 << _STATUS_BITS) - 1


class MoveStatus(IntEnum):
    """How far a move has come. A FAILED one has changed no page that may be read, FAILED_TORN excepted.

    Ordered: on a group, the greatest failure is what is told, else the least status.
    """

    PENDING = 0
    """Nothing is known of it."""
    ENQUEUED = 1
    """A LOAD has leased and verified its slot; its copy comes before whatever waits for its page."""
    DONE = 2
    FAILED_STALE = 3
    """The slot is not, or no longer, what the move takes it for; nothing was copied."""
    FAILED_IO = 4
    """Anything else; nothing was copied, or nothing that counts."""
    FAILED_CORRUPT = 5
    """The bytes in the slot are not those that were saved; nothing was copied."""
    FAILED_TORN = 6
    """The slot was given to another page during the copy: a bug. A page read since holds foreign bytes."""

    @property
    def is_over(self) -> bool:
        """Tell whether the move will touch neither page nor slot again."""
        return self >= MoveStatus.DONE

    @property
    def is_failed(self) -> bool:
        """Tell whether it came to nothing."""
        return self > MoveStatus.DONE


class MoveBoard:
    """One ring of words a rank, a word a move: move << 8 | status. Words are aligned and written whole."""

    def __init__(self, rank: int, size: int, memory: mmap.mmap | bytearray, capacity: int) -> None:
        self._rank = rank
        self._size = size
        self._capacity = capacity
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")

    @classmethod
    def private(cls, capacity: int = MOVE_CAPACITY) -> Self:
        """Return the board of a group of one."""
        return cls(0, 1, bytearray(8 * capacity), capacity)

    @classmethod
    def shared(cls, store: MeetingStore, rank: int, size: int, capacity: int = MOVE_CAPACITY) -> Self:
        """Map one board on all ranks.

        Raise OSError when a rank cannot open it: all ranks must run on one machine.
        """
        return cls(rank, size, map_shared(store, "moves", rank, size, 8 * size * capacity), capacity)

    @property
    def capacity(self) -> int:
        """Moves that may be in flight: move n begins only once move n - capacity is over on every rank."""
        return self._capacity

    def publish(self, move: int, status: MoveStatus) -> None:
        """Tell what has become of a move on this rank. Moves count from 1; a status never goes back."""
        self.publish_all([(move, status)])

    def publish_all(self, told: Iterable[tuple[int, MoveStatus]]) -> None:
        """Tell what has become of moves, one after another."""
        words, capacity, first = self._words, self._capacity, self._rank * self._capacity
        for move, status in told:
            place = first + move % capacity
            word = move << _STATUS_BITS | status
            assert move > 0 and word > words[place], (
                f"move {move} is {status.name} where move {words[place] >> _STATUS_BITS}"
                f" is {MoveStatus(words[place] & _STATUS_MASK).name} already"
            )
            words[place] = word

    def own_status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        return self._status(self._rank, move)

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on the group.

        The worst failure if it failed on any rank, be it still under way on others (see `is_over`); else what
        it has come to on all of them. For moves less than `capacity` old.
        """
        statuses = [self._status(rank, move) for rank in range(self._size)]
        worst = max(statuses)
        return worst if worst.is_failed else min(statuses)

    def statuses(self, move: int) -> list[MoveStatus]:
        """Return what has become of a move on each rank; nothing once its word is a later move's."""
        if any(self._word(rank, move) >> _STATUS_BITS > move for rank in range(self._size)):
            return []
        return [self._status(rank, move) for rank in range(self._size)]

    def is_over(self, move: int) -> bool:
        """Tell whether no rank will touch the move's page or slot again, whatever came of it."""
        return all(self._status(rank, move).is_over for rank in range(self._size))

    def close(self) -> None:
        """Unmap the board. Idempotent."""
        self._words.release()
        self._bytes.release()
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()

    def _status(self, rank: int, move: int) -> MoveStatus:
        word = self._word(rank, move)
        known = word >> _STATUS_BITS
        assert known <= move, f"asked for move {move}, whose word is move {known}'s: too many are in flight"
        return MoveStatus(word & _STATUS_MASK) if known == move else MoveStatus.PENDING

    def _word(self, rank: int, move: int) -> int:
        return self._words[rank * self._capacity + move % self._capacity]
