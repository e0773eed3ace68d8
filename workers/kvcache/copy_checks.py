"""What SAVEs and LOADs check before their copies are enqueued and after these are over (I7).

Used by CopyLane, in its thread; checksums are spread over a few more. No torch.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from cache_service.native.checksum import Checksums
from workers.kvcache.arena_part import ArenaPart
from workers.kvcache.moves import Move, MoveKind
from workers.move_board import MoveStatus

MAX_CHECKSUM_THREADS = 8
"""One thread reads some 10 to 30 GB/s from memory, where pages move at 50 in each direction."""
CORES_PER_CHECKSUM_THREAD = 2


def num_checksum_threads() -> int:
    """Return how many threads help a lane's own, as the cores that this process may use allow."""
    return min(MAX_CHECKSUM_THREADS, len(os.sched_getaffinity(0)) // CORES_PER_CHECKSUM_THREAD) - 1


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
        unsure = [move for move in leased if self._arena.must_verify(move)]
        intact = dict.fromkeys(leased, True)
        for move, checksum in zip(unsure, self._arena.checksums(self._checksums, unsure), strict=True):
            intact[move] = self._arena.verify(move, checksum)
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
        checksums = self._arena.checksums(self._checksums, moves)
        return [
            MoveStatus.DONE if self._arena.seal(move, checksum) else MoveStatus.FAILED_TORN
            for move, checksum in zip(moves, checksums, strict=True)
        ]

    def let_go(self, moves: Sequence[Move]) -> None:
        """Nothing: the grant is the group's."""
