"""MoveShadow: the sanitizer's memory of SAVEs and LOADs: whose copy may still run, what a LOAD must bring.

Owned by KVSanitizer, in the Engine's thread. It asks the mover, never the plan, what became of a move.
"""

from collections import deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache_service.keys import PageKey
from workers.kvcache.moves import Move, moves_of
from workers.kvcache.sanitizer_error import SanitizerError
from workers.move_board import MoveStatus
from workers.plan import LoadPages, SavePages

_WAS_ENQUEUED = (MoveStatus.ENQUEUED, MoveStatus.DONE, MoveStatus.FAILED_TORN)


class MoveWitness(Protocol):
    """What the sanitizer asks of a mover."""

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        ...

    def comes_first(self, move: int) -> bool:
        """Tell whether what the device computes next comes after a LOAD that is not over."""
        ...

    def saved_checksum(self, slot: int) -> int | None:
        """Return the checksum of this rank's bundle in a slot, as its header has it; None: no arena yet."""
        ...

    def page_checksum(self, page: int, key: PageKey) -> int:
        """Return the checksum of a page's bytes in the pool as they are now."""
        ...


class MoveShadow:
    """Moves of one rank from their op on; a LOAD is forgotten once its page was read or freed.

    `checks_bytes` off leaves the order of moves and steps.
    """

    def __init__(self, witness: MoveWitness, checks_bytes: bool = True) -> None:
        self._witness = witness
        self._checks_bytes = checks_bytes
        self._in_flight: deque[_Watched] = deque()
        self._loads: dict[int, _Watched] = {}  # by page
        self._saves: dict[int, list[_Watched]] = {}  # by page

    def settle(self) -> None:
        """Take note of moves that are over, before the board needs their words for others."""
        while self._in_flight and self._status(self._in_flight[0]).is_over:
            watched = self._in_flight.popleft()
            page = watched.move.page
            if watched.move.kind == "save" and page in self._saves:
                self._saves[page] = [other for other in self._saves[page] if other is not watched]
                if not self._saves[page]:
                    del self._saves[page]

    def begin(self, op: SavePages | LoadPages) -> None:
        """Follow an op's moves; the slots of LOADs are read now, while they hold what the plan knows."""
        for move in moves_of(op):
            if move.kind == "save":
                self.check_loaded(None, move.page)
                watched = _Watched(move, 0)
                self._saves.setdefault(move.page, []).append(watched)
            else:
                checksum = self._witness.saved_checksum(move.slot) if self._checks_bytes else None
                watched = self._loads[move.page] = _Watched(move, checksum)
            self._in_flight.append(watched)

    def check_completed(self, page: int, key: bytes) -> None:
        """Require that a loading page may be named: its LOAD got past verification, and is of this key."""
        watched = self._loads[page]
        if watched.move.key != key:
            raise SanitizerError("complete_key", None, page, watched.move.key.hex(), key.hex())
        status = self._status(watched)
        if status not in _WAS_ENQUEUED:
            raise SanitizerError("complete_loading", None, page, "a LOAD that was enqueued", status.name)

    def check_freed(self, page: int) -> None:
        """Require that no copy from or to a page can still run, and forget the page."""
        moves = self._saves.pop(page, []) + [load for load in [self._loads.pop(page, None)] if load]
        for watched in moves:
            if not (status := self._status(watched)).is_over:
                raise SanitizerError(
                    f"free_{watched.move.kind}", None, page, f"move {watched.move.number} over", status.name
                )

    def check_reads(
        self,
        slots: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int64],
        read: npt.NDArray[np.bool_],
    ) -> None:
        """Hold the pages [rows, columns] that a step reads, where `read`, against their LOADs."""
        if not self._loads:
            return
        for row, column in np.argwhere(read & np.isin(pages, list(self._loads))):
            self.check_loaded(int(slots[row]), int(pages[row, column]))

    def check_loaded(self, slot: int | None, page: int) -> None:
        """Require that a page's LOAD, if it had one, comes first and brings the bytes that were saved.

        It is over, or the device waits for it. One that was torn has told so on the board; it passes if the
        page holds the right bytes all the same.
        """
        watched = self._loads.get(page)
        if watched is None:
            return
        status = self._status(watched)
        is_awaited = status is MoveStatus.ENQUEUED and self._witness.comes_first(watched.move.number)
        if status not in (MoveStatus.DONE, MoveStatus.FAILED_TORN) and not is_awaited:
            raise SanitizerError("page_loaded", slot, page, "a LOAD that is done", status.name)
        if watched.checksum is not None:
            self._check_bytes(watched, slot, watched.checksum, status)
        del self._loads[page]

    def _check_bytes(self, watched: "_Watched", slot: int | None, saved: int, status: MoveStatus) -> None:
        found = self._witness.page_checksum(watched.move.page, watched.move.key)
        if found != saved:
            raise SanitizerError(
                "loaded_bytes",
                slot,
                watched.move.page,
                f"checksum {saved:016x}, as saved",
                f"{found:016x} after a LOAD that is {status.name}",
            )

    def _status(self, watched: "_Watched") -> MoveStatus:
        if not watched.status.is_over:
            watched.status = self._witness.status(watched.move.number)
        return watched.status


class _Watched:
    """A move and, for a LOAD, the checksum of the bytes it has to bring; None: they are not looked at."""

    def __init__(self, move: Move, checksum: int | None) -> None:
        self.move = move
        self.checksum = checksum
        self.status = MoveStatus.PENDING
