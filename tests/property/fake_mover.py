"""FakeMover: one rank's SAVEs and LOADs, each a step further when a test says so, in any order."""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from cache_service.page_records import Location
from tests.property.fake_arena import Contents, FakeArena, checksum
from workers.kvcache.moves import Move, moves_of
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages


class Pages(Protocol):
    """A rank, as its mover copies from and to it."""

    def copy_out(self, page: int) -> Contents: ...

    def copy_in(self, page: int, contents: Contents) -> None: ...

    def copy_in_torn(self, page: int, contents: Contents) -> None: ...


@dataclass(frozen=True)
class Faults:
    """Shares of all moves that fail, whatever they find."""

    io_ratio: float = 0.0
    stale_ratio: float = 0.0
    torn_ratio: float = 0.0
    late_ratio: float = 0.0
    """Of LOADs that a step waits for: the verdict comes later, as where a device copies by itself."""


class FakeMover:
    """Copies what is there when the copy runs, so that what came too early or too late shows."""

    def __init__(
        self, part: int, pages: Pages, arena: FakeArena, board: MoveBoard, faults: Faults, chance: Random
    ) -> None:
        self.arena = arena
        self._part = part
        self._pages = pages
        self._board = board
        self._faults = faults
        self._chance = chance
        self._in_flight: dict[int, Move] = {}
        self._verdicts: dict[int, MoveStatus] = {}  # of copies that are over, and not told

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, op: SavePages | LoadPages) -> None:
        for move in moves_of(op):
            assert move.number not in self._in_flight, f"move: {move.number} twice"
            self._in_flight[move.number] = move

    def advance(self, ratio: float) -> None:
        """Take a share of the moves one step further."""
        for move in self._chance.sample(list(self._in_flight.values()), len(self._in_flight)):
            if self._chance.random() < ratio:
                self._advance(move)

    def wait_for(self, slot: int, pages: Iterable[int]) -> None:
        """The copies of pages that a row reads end before it: they have to be enqueued (I5)."""
        read = set(pages)
        for move in [move for move in self._in_flight.values() if move.kind == "load" and move.page in read]:
            assert self.status(move.number) is MoveStatus.ENQUEUED, (
                f"load: slot {slot} reads page {move.page}, whose LOAD is {self.status(move.number).name}"
            )
            if self._faults.late_ratio and self._chance.random() < self._faults.late_ratio:
                if move.number not in self._verdicts:
                    self._verdicts[move.number] = self._load(move)
            else:
                self._advance(move)

    def move_of(self, page: int) -> Move | None:
        """Return a move that may still touch a page."""
        return next((move for move in self._in_flight.values() if move.page == page), None)

    # What the sanitizer asks.

    def status(self, move: int) -> MoveStatus:
        return self._board.own_status(move)

    def comes_first(self, move: int) -> bool:
        return move in self._verdicts

    def saved_checksum(self, slot: int) -> int:
        return self.arena.slots[slot].checksums.get(self._part, 0)

    def page_checksum(self, page: int, key: bytes) -> int:
        return checksum(self._pages.copy_out(page))

    @property
    def _reader(self) -> str:
        return f"rank {self._part}"

    def _advance(self, move: Move) -> None:
        if move.number in self._verdicts:
            status = self._verdicts.pop(move.number)
        elif move.kind == "save":
            status = self._save(move)
        elif self.status(move.number) is MoveStatus.PENDING:
            status = self._begin_load(move)
        else:
            status = self._load(move)
        self._board.publish(move.number, status)
        if status.is_over:
            del self._in_flight[move.number]

    def _save(self, move: Move) -> MoveStatus:
        slot = self.arena.slots[move.slot]
        if self._chance.random() < self._faults.io_ratio:
            return MoveStatus.FAILED_IO
        if slot.epoch != move.epoch or self._chance.random() < self._faults.stale_ratio:
            return MoveStatus.FAILED_STALE
        slot.parts[self._part] = contents = self._pages.copy_out(move.page)
        slot.checksums[self._part] = checksum(contents)
        return MoveStatus.DONE

    def _begin_load(self, move: Move) -> MoveStatus:
        if self._chance.random() < self._faults.io_ratio:
            return MoveStatus.FAILED_IO
        if self._chance.random() < self._faults.stale_ratio or not self.arena.lease(
            self._reader, move.key, Location(move.slot, move.epoch)
        ):
            return MoveStatus.FAILED_STALE
        slot = self.arena.slots[move.slot]
        if checksum(slot.parts[self._part]) != slot.checksums[self._part]:
            self.arena.release(self._reader, move.slot)
            return MoveStatus.FAILED_CORRUPT
        return MoveStatus.ENQUEUED

    def _load(self, move: Move) -> MoveStatus:
        slot = self.arena.slots[move.slot]
        assert slot.epoch == move.epoch, f"lease: slot {move.slot} is given away under its reader"
        is_torn = self._chance.random() < self._faults.torn_ratio
        if is_torn:
            self._pages.copy_in_torn(move.page, slot.parts[self._part])
        else:
            self._pages.copy_in(move.page, slot.parts[self._part])
        self.arena.release(self._reader, move.slot)
        return MoveStatus.FAILED_TORN if is_torn else MoveStatus.DONE
