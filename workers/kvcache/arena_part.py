"""ArenaPart: one rank's bundles in its node's arena, and what makes them safe to read and write (I7).

Shared by the movers of all devices, in their threads: leases, grants, epochs and checksums. No torch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Literal, NamedTuple

import numpy
from numpy.typing import NDArray

from cache_service.arena import Arena
from cache_service.arena_format import bundle_checksum, checksum_seed
from cache_service.lease_row import LeaseRow
from cache_service.native.checksum import Checksums, Sums
from cache_service.page_records import Location
from workers.kvcache.moves import Move

VerifyPolicy = Literal["always", "once"]
"""Which LOADs check their bytes first: all, or the first of each slot and epoch. For `once` the slot must
have been written on this node since its arena was opened."""


class MoverError(ValueError):
    """Pool and arena do not fit each other."""


class MappedArena(NamedTuple):
    """An arena that this process has mapped, and its row of lease bytes, which others may use as well."""

    arena: Arena
    leases: LeaseRow


class ArenaPart:
    """The `part`-th bundles of the arena that `mapped` tells, None while there is none; then it stays.

    Raises MoverError where the arena is of other bundles.
    """

    def __init__(
        self,
        mapped: Callable[[], MappedArena | None],
        part: int,
        bundle_bytes: int,
        verify: VerifyPolicy,
        *,
        verifies_loads: bool = True,
    ) -> None:
        self.part = part
        self._mapped = mapped
        self._bundle_bytes = bundle_bytes
        self._verifies_all = verify == "always"
        self._verifies_loads = verifies_loads
        self._verified: dict[int, int] = {}  # slot -> epoch, under the arena's incarnation of then
        self._place = 0, 0  # of the first bundle, and from one to the next
        self._incarnation = 0
        self._is_mapped = False
        self.is_there()

    def is_there(self) -> bool:
        """Tell whether the arena is there, and take it the first time. Raises MoverError."""
        mapped = None if self._is_mapped else self._mapped()
        if mapped is None:
            return self._is_mapped
        arena, leases = mapped
        if self._bundle_bytes != arena.spec.bundle_bytes or not 0 <= self.part < arena.spec.num_ranks:
            raise MoverError(
                f"part {self.part} of bundles of {self._bundle_bytes} bytes; {arena.path} has"
                f" {arena.spec.num_ranks} parts of {arena.spec.bundle_bytes} bytes: attach to an arena of"
                " this group's layout"
            )
        self.arena, self._leases = arena, leases
        self.bundles: NDArray[numpy.uint8] = arena.bundles(self.part)
        """`[num_slots, bundle_bytes]`, this rank's."""
        self._place = self.bundles.ctypes.data, self.bundles.strides[0]
        self._incarnation = arena.incarnation
        self._is_mapped = True
        return True

    def forget(self) -> None:
        """Let go of the arena's bytes: it is unmapped once nobody refers to them."""
        if self._is_mapped:
            self.bundles = self.bundles[:0].copy()

    def has(self, move: Move) -> bool:
        """Tell whether a move's slot exists."""
        return 0 <= move.slot < self.arena.spec.num_slots

    # One move at a time.

    def lease(self, move: Move) -> bool:
        """Lease the slot of a LOAD until `release`; False: it is not what the move takes it for."""
        return self._leases.acquire_one(move.key, Location(move.slot, move.epoch))

    def release(self, move: Move) -> None:
        """Give the lease of a LOAD back, once nothing reads its slot any more."""
        self._leases.release([move.slot])

    def is_current(self, move: Move) -> bool:
        """Tell whether a leased slot still is what it was leased for: asked once its bytes are copied."""
        return self._leases.is_current(Location(move.slot, move.epoch))

    def is_intact(self, move: Move) -> bool:
        """Tell whether the bytes of a leased slot are those that were saved, as far as the policy asks."""
        self._forget_if_adopted()
        is_known = not self._verifies_all and self._verified.get(move.slot) == move.epoch
        if is_known or not self._verifies_loads:
            return True
        if self.checksum(move) != self.saved_checksum(move.slot):
            return False
        self._verified[move.slot] = move.epoch
        return True

    def is_granted(self, move: Move) -> bool:
        """Tell whether a slot is still granted as the move was told: epochs are odd while it is written."""
        return move.epoch % 2 == 1 and self.arena.epoch(move.slot) == move.epoch

    def seal(self, move: Move, checksum: int) -> bool:
        """Say that the bytes of a SAVE are there; False: the grant has ended, and nothing was said."""
        self.arena.fence()
        if not self.is_granted(move):
            return False
        self.arena.set_checksum(move.slot, self.part, checksum)
        return True

    def checksum(self, move: Move) -> int:
        """Return the checksum of the bytes that a move's slot has now. Releases the interpreter's lock."""
        return bundle_checksum(self.bundles[move.slot].data, move.key, self.part)

    # The same of many moves at once: an answer for each, in order.

    def lease_all(self, moves: Sequence[Move]) -> list[bool]:
        """See `lease`."""
        return self._leases.acquire_all([(move.slot, move.epoch, move.key) for move in moves])

    def release_all(self, moves: Iterable[Move]) -> None:
        """See `release`."""
        self._leases.release([move.slot for move in moves])

    def are_current(self, moves: Sequence[Move]) -> list[bool]:
        """See `is_current`."""
        return self._leases.are_current([move.slot for move in moves], [move.epoch for move in moves])

    def must_verify(self, moves: Iterable[Move]) -> bool:
        """Tell whether the policy asks for the checksum of any of the leased slots' bytes."""
        self._forget_if_adopted()
        if not self._verifies_loads or self._verifies_all:
            return self._verifies_loads
        return any(self._verified.get(move.slot) != move.epoch for move in moves)

    def verify_all(self, moves: Sequence[Move], checksums: Sequence[int]) -> list[bool]:
        """Hold the checksums of leased slots' bytes against those that were saved with them."""
        saved = self.arena.checksums([move.slot for move in moves], self.part)
        are_intact = [found == wanted for found, wanted in zip(checksums, saved, strict=True)]
        self._verified.update((move.slot, move.epoch) for move in compress(moves, are_intact))
        return are_intact

    def are_granted(self, moves: Sequence[Move]) -> list[bool]:
        """See `is_granted`."""
        epochs = self.arena.epochs([move.slot for move in moves])
        return [epoch % 2 == 1 and epoch == move.epoch for move, epoch in zip(moves, epochs, strict=True)]

    def seal_all(self, moves: Sequence[Move], checksums: Sequence[int]) -> list[bool]:
        """See `seal`."""
        self.arena.fence()
        are_granted = self.are_granted(moves)
        for move, checksum in compress(zip(moves, checksums, strict=True), are_granted):
            self.arena.set_checksum(move.slot, self.part, checksum)
        return are_granted

    def begin_checksums(self, checksums: Checksums, moves: Sequence[Move]) -> Sums:
        """Have compiled threads compute `checksum`."""
        seeds = [checksum_seed(move.key, self.part) for move in moves]
        return checksums.begin(self.addresses(moves), self._bundle_bytes, seeds)

    def addresses(self, moves: Iterable[Move]) -> list[int]:
        """Return where the bundles begin."""
        base, stride = self._place
        return [base + move.slot * stride for move in moves]

    def saved_checksum(self, slot: int) -> int | None:
        """Return the checksum of this rank's bundle in a slot, as its header has it; None: no arena yet."""
        return self.arena.checksum(slot, self.part) if self.is_there() else None

    def flip_bit(self, slot: int) -> None:
        """Damage a bundle, as an injected fault does."""
        bundle = self.bundles[slot]
        bundle[len(bundle) // 2] ^= 1

    def _forget_if_adopted(self) -> None:
        """Have all slots looked at anew once another server has adopted the arena."""
        if self.arena.incarnation != self._incarnation:
            self._incarnation = self.arena.incarnation
            self._verified.clear()
