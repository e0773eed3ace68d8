"""What SAVEs and LOADs check before their copies are enqueued and after these are over (I7).

Used by CopyLane, in its thread; checksums are spread over a few more. No torch.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from workers.kvcache.arena_part import ArenaPart
from workers.kvcache.moves import Move, MoveKind
from workers.move_board import MoveStatus

MAX_CHECKSUM_THREADS = 4
"""One thread checks 28 to 60 GB/s, as fast as pages move."""
CORES_PER_CHECKSUM_THREAD = 4

T = TypeVar("T")


class Checksums:
    """Threads that compute checksums, without the interpreter's lock; `num_threads` 0: the caller's own."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "page-checksum") if num_threads else None
        self._num_threads = num_threads

    @classmethod
    def of_this_machine(cls) -> "Checksums":
        """Return as many threads as the cores that this process may use allow."""
        num_cores = len(os.sched_getaffinity(0))
        return cls(min(MAX_CHECKSUM_THREADS, max(1, num_cores // CORES_PER_CHECKSUM_THREAD)))

    def map(self, check: Callable[[Move], T], moves: Sequence[Move]) -> list[T]:
        """Return what `check` says of each move."""
        num_parts = min(self._num_threads, len(moves))
        if self._pool is None or num_parts <= 1:
            return [check(move) for move in moves]
        parts = [moves[first::num_parts] for first in range(num_parts)]
        found: list[T | None] = [None] * len(moves)
        results = [self._pool.submit(lambda part: [check(move) for move in part], part) for part in parts]
        for first, result in enumerate(results):
            found[first::num_parts] = result.result()
        return found  # type: ignore[return-value]  # each place has been filled

    def close(self) -> None:
        """End the threads. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()


class CopyChecks(Protocol):
    """One kind's checks."""

    kind: MoveKind

    def before(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Say which may be copied, ENQUEUED, and why others may not. What may be is held until `let_go`."""
        ...

    def after(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Say what has come of moves whose copies are over."""
        ...

    def let_go(self, moves: Sequence[Move]) -> None:
        """Give back what moves hold."""


class LoadChecks:
    """Lease, verify on the arena's bytes; look at the epoch again once they are copied."""

    kind: MoveKind = "load"

    def __init__(self, arena: ArenaPart, checksums: Checksums) -> None:
        self._arena = arena
        self._checksums = checksums

    def before(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Lease slots and verify their bytes."""
        leased = [move for move in moves if self._arena.lease(move)]
        intact = dict(zip(leased, self._checksums.map(self._arena.is_intact, leased), strict=True))
        self.let_go([move for move in leased if not intact[move]])
        return [
            MoveStatus.FAILED_STALE
            if move not in intact
            else MoveStatus.ENQUEUED
            if intact[move]
            else MoveStatus.FAILED_CORRUPT
            for move in moves
        ]

    def after(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Look whether the slots are what they were."""
        return [MoveStatus.DONE if self._arena.is_current(move) else MoveStatus.FAILED_TORN for move in moves]

    def let_go(self, moves: Sequence[Move]) -> None:
        """Give leases back."""
        for move in moves:
            self._arena.release(move)


class SaveChecks:
    """Look for the grant; once the arena has the bytes, write their checksum, under the grant still."""

    kind: MoveKind = "save"

    def __init__(self, arena: ArenaPart, checksums: Checksums) -> None:
        self._arena = arena
        self._checksums = checksums

    def before(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Look for the grants."""
        return [
            MoveStatus.ENQUEUED if self._arena.is_granted(move) else MoveStatus.FAILED_STALE for move in moves
        ]

    def after(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Write checksums of what the arena has."""
        checksums = self._checksums.map(self._arena.checksum, moves)
        return [
            MoveStatus.DONE if self._arena.seal(move, checksum) else MoveStatus.FAILED_TORN
            for move, checksum in zip(moves, checksums, strict=True)
        ]

    def let_go(self, moves: Sequence[Move]) -> None:
        """Nothing: the grant is the group's."""
