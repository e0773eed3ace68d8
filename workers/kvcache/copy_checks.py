"""What SAVEs and LOADs check before their copies are enqueued and after these are over (I7).

Used by CopyLane, in its thread; other threads compute the checksums. No torch.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from cache_service.native.checksum import Checksums, Sums
from workers.kvcache.arena_part import ArenaPart
from workers.kvcache.moves import Move, MoveKind
from workers.move_board import MoveStatus

MAX_CHECKSUM_THREADS = 8
"""One thread reads some 10 to 30 GB/s from memory, where pages move at 50 in each direction."""
CORES_PER_CHECKSUM_THREAD = 2
_STALE, _TORN = MoveStatus.FAILED_STALE, MoveStatus.FAILED_TORN


def num_checksum_threads() -> int:
    """Return how many threads compute checksums, as the cores that this process may use allow.

    0: too few for any, the lanes' threads do it.
    """
    num_threads = min(MAX_CHECKSUM_THREADS, len(os.sched_getaffinity(0)) // CORES_PER_CHECKSUM_THREAD)
    return num_threads if num_threads > 1 else 0


class CopyChecks(Protocol):
    """One kind's checks."""

    kind: MoveKind

    def before(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Say which may go on, ENQUEUED, and why others may not. What may go on is held until `let_go`."""
        ...

    def begin_checksums(self, moves: Sequence[Move]) -> Sums | None:
        """Begin to read what the arena has; None: there is no need."""
        ...

    def after(self, moves: Sequence[Move], checksums: Sequence[int] | None) -> list[MoveStatus]:
        """Say what has come of moves whose copies are over; `checksums` are a SAVE's."""
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
        """Lease slots."""
        return _told(self._arena.lease_all(moves), MoveStatus.ENQUEUED, _STALE)

    def begin_checksums(self, moves: Sequence[Move]) -> Sums | None:
        """Read all of a batch in which one is not known."""
        is_any = self._arena.must_verify(moves)
        return self._arena.begin_checksums(self._checksums, moves) if is_any else None

    def verified(self, moves: Sequence[Move], checksums: Sequence[int]) -> list[MoveStatus]:
        """Say which have the bytes that were saved, ENQUEUED."""
        return _told(self._arena.verify_all(moves, checksums), MoveStatus.ENQUEUED, MoveStatus.FAILED_CORRUPT)

    def after(self, moves: Sequence[Move], checksums: Sequence[int] | None) -> list[MoveStatus]:
        """Look whether the slots are what they were."""
        return _told(self._arena.are_current(moves), MoveStatus.DONE, _TORN)

    def let_go(self, moves: Sequence[Move]) -> None:
        """Give leases back."""
        self._arena.release_all(moves)


class SaveChecks:
    """Look for the grant; once the arena has the bytes, write their checksum, under the grant still."""

    kind: MoveKind = "save"

    def __init__(self, arena: ArenaPart, checksums: Checksums) -> None:
        self._arena = arena
        self._checksums = checksums

    def before(self, moves: Sequence[Move]) -> list[MoveStatus]:
        """Look for the grants."""
        return _told(self._arena.are_granted(moves), MoveStatus.ENQUEUED, _STALE)

    def begin_checksums(self, moves: Sequence[Move]) -> Sums | None:
        """Read what the arena has, not the pool."""
        return self._arena.begin_checksums(self._checksums, moves)

    def after(self, moves: Sequence[Move], checksums: Sequence[int] | None) -> list[MoveStatus]:
        """Write checksums."""
        assert checksums is not None, "a SAVE's are always computed"
        return _told(self._arena.seal_all(moves, checksums), MoveStatus.DONE, _TORN)

    def let_go(self, moves: Sequence[Move]) -> None:
        """Nothing: the grant is the group's."""


def _told(are_so: Sequence[bool], so: MoveStatus, not_so: MoveStatus) -> list[MoveStatus]:
    return [so if is_so else not_so for is_so in are_so]
