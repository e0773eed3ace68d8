"""PageMover: carries out one rank's SAVEs and LOADs, copies between its KVPool and its node's arena.

The Engine starts moves and waits for LOADs, in its thread; a few threads of the mover do the copying, which
runs beside the step. What becomes of a move stands on the MoveBoard (I2, I5, I7).
"""

import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy
from numpy.typing import NDArray

from cache_service.arena import Arena
from cache_service.arena_format import bundle_checksum
from cache_service.keys import PageKey
from cache_service.lease_row import LeaseRow
from cache_service.page_records import Location
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.moves import NO_FAULT, Fault, Move, MoveInjection, MoveStats, moves_of
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

logger = logging.getLogger(__name__)

VerifyPolicy = Literal["always", "once"]
"""Which LOADs check their bytes first: all, or the first of each slot and epoch. For `once` the slot must
have been written on this node since its arena was opened."""

NUM_THREADS = 1
"""Moves are short, and their threads wait for the interpreter between copies: on two free cores two of them
moved no more than one (1 MiB pages: 83 us a page either way) and took up to a third more processor time."""
LOAD_TIMEOUT_S = 30.0
"""The longest wait of a step for its LOADs, which are copies within this node's memory."""
PIECE_BYTES = 256 << 10
"""Copied at once: below the size of a core's own cache libc does not read a target that it overwrites (1 MiB:
46 us instead of 58 on a Zen 5 core), and the checksum of a SAVE finds the bytes near."""
_CLOSE_TIMEOUT_S = 30.0
_IDLE_S = 60.0


class MoverError(ValueError):
    """Pool and arena do not fit each other."""


class MoveTimeoutError(RuntimeError):
    """A move did not end in time: its thread hangs, and the replica with it."""


class MappedArena(NamedTuple):
    """An arena that this process has mapped, and its row of lease bytes, which others may use as well."""

    arena: Arena
    leases: LeaseRow


class PageMover:
    """Threads that copy pages of `pool` from and to the `part`-th bundle of the arena's slots.

    `mapped` tells the arena, None while there is none: moves fail until it is there, and it stays for good.
    The caller closes the mover before arena, board and pool. `stats` is to be read only.
    """

    def __init__(
        self,
        pool: KVPool,
        mapped: Callable[[], MappedArena | None],
        part: int,
        board: MoveBoard,
        *,
        verify: VerifyPolicy = "always",
        num_threads: int = NUM_THREADS,
        mechanisms: Mechanisms = ALL_ON,
        injection: MoveInjection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if pool.data.device.type != "cpu":
            raise MoverError(f"the pool is on {pool.data.device}; pages are moved from and to a CPU's pool")
        self.stats = MoveStats()
        # numpy copies without the interpreter's lock and, unlike torch, without threads of its own.
        self._pages: NDArray[numpy.uint8] = pool.data.numpy()
        self._bundle_bytes = pool.layout.bundle_bytes
        self._mapped = mapped
        self._part = part
        self._board = board
        self._verifies_all = verify == "always"
        self._verified: dict[int, int] = {}  # slot -> epoch, under the arena's incarnation of then
        self._incarnation = 0
        self._mechanisms = mechanisms
        self._injection = injection
        self._clock = clock
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._has_ended = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._queue: list[tuple[bool, int, Move]] = []  # a heap: LOADs first, then by number
        self._num_in_flight = 0
        self._loading: dict[int, int] = {}  # page -> move
        self._is_mapped = False
        self._map()
        self._threads = [
            threading.Thread(target=self._work, name=f"page-mover-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_in_flight(self) -> int:
        """Moves that were started and are not over."""
        return self._num_in_flight

    def start(self, op: SavePages | LoadPages) -> None:
        """Begin an op's moves, which end in their own time and order. Never blocks."""
        moves = moves_of(op)
        assert not self._closing.is_set(), "the mover is closed"
        with self._lock:
            for move in moves:
                assert move.page != DUMMY_PAGE, f"move {move.number} is of the dummy page"
                if move.kind == "load":
                    assert move.page not in self._loading, f"page {move.page} is being loaded already"
                    self._loading[move.page] = move.number
                place = self._injection.place(move, self._part) if self._injection else move.number
                heapq.heappush(self._queue, (move.kind == "save", place, move))
            self._num_in_flight += len(moves)
            self._has_work.notify(len(moves))

    def loading_pages(self) -> list[int]:
        """Return the pages of LOADs in flight."""
        if not self._loading:  # only the caller's thread adds to it
            return []
        with self._lock:
            return list(self._loading)

    def wait_for(self, pages: Iterable[int], timeout_s: float = LOAD_TIMEOUT_S) -> bool:
        """Let what the caller computes next come after the LOADs in flight of `pages`; True if any is.

        On return their verdicts are on the board. Raises MoveTimeoutError.
        """
        with self._lock:
            awaited = [(page, self._loading[page]) for page in pages if page in self._loading]

            def have_ended() -> bool:
                return all(self._loading.get(page) != move for page, move in awaited)

            if not self._has_ended.wait_for(have_ended, timeout_s):
                raise MoveTimeoutError(
                    f"LOADs (page, move) {awaited} are not over after {timeout_s} s; restart the replica"
                )
        return bool(awaited)

    def _map(self) -> bool:
        """Tell whether the arena is there, and take it the first time. Raises MoverError."""
        mapped = None if self._is_mapped else self._mapped()
        if mapped is None:
            return self._is_mapped
        arena, leases = mapped
        if self._bundle_bytes != arena.spec.bundle_bytes or not 0 <= self._part < arena.spec.num_ranks:
            raise MoverError(
                f"part {self._part} of bundles of {self._bundle_bytes} bytes; {arena.path} has"
                f" {arena.spec.num_ranks} parts of {arena.spec.bundle_bytes} bytes: attach to an arena of"
                " this group's layout"
            )
        self._arena, self._leases, self._bundles = arena, leases, arena.bundles(self._part)
        self._incarnation = arena.incarnation
        self._is_mapped = True
        return True

    def close(self) -> None:
        """End the threads: copies under way are finished, moves that have not begun fail. Idempotent."""
        self._closing.set()
        with self._lock:
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)
        if any(thread.is_alive() for thread in self._threads):
            raise MoveTimeoutError(f"{self._num_in_flight} moves did not end in {_CLOSE_TIMEOUT_S} s")
        if self._is_mapped:
            self._bundles = self._bundles[:0].copy()  # the arena is unmapped once nobody refers to it

    # What the sanitizer asks.

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        return self._board.own_status(move)

    def saved_checksum(self, slot: int) -> int:
        """Return the checksum of this rank's bundle in a slot, as its header has it now."""
        return self._arena.checksum(slot, self._part)

    def page_checksum(self, page: int, key: PageKey) -> int:
        """Return the checksum of a page's bytes in the pool as they are now."""
        return bundle_checksum(self._pages[page].data, key, self._part)

    # The threads.

    def _work(self) -> None:
        while (move := self._next()) is not None:
            began_s = self._clock()
            try:
                status = self._carry_out(move)
            except Exception:  # a thread's top: the move fails, the group hears of it and goes on
                logger.exception("move failed", extra={"move": move.number, "kind": move.kind})
                status = MoveStatus.FAILED_IO
            self._end(move, status, self._clock() - began_s)

    def _next(self) -> Move | None:
        with self._lock:
            while not self._queue:
                if self._closing.is_set():
                    return None
                self._has_work.wait(_IDLE_S)
            return heapq.heappop(self._queue)[2]

    def _end(self, move: Move, status: MoveStatus, seconds: float) -> None:
        with self._lock:
            self._board.publish(move.number, status)
            self.stats.finished(move, status, self._bundle_bytes, seconds)
            self._num_in_flight -= 1
            if move.kind == "load":
                del self._loading[move.page]
                self._has_ended.notify_all()

    def _carry_out(self, move: Move) -> MoveStatus:
        fault = self._injection.fault(move, self._part) if self._injection else NO_FAULT
        if fault.delay_s:
            self._closing.wait(fault.delay_s)
        if fault.fails or self._closing.is_set() or not self._map():
            return MoveStatus.FAILED_IO
        return self._save(move, fault) if move.kind == "save" else self._load(move, fault)

    def _save(self, move: Move, fault: Fault) -> MoveStatus:
        """Write the page's bytes, then the checksum that says they are there."""
        arena, slot = self._arena, move.slot
        if not self._is_granted(move):
            return MoveStatus.FAILED_STALE
        bundle = self._bundles[slot]
        self._copy(move, fault, self._pages[move.page], bundle)
        checksum = bundle_checksum(bundle.data, move.key, self._part)  # of what the arena has, not the pool
        arena.fence()
        if not self._is_granted(move):
            return MoveStatus.FAILED_TORN
        arena.set_checksum(slot, self._part, checksum)
        if fault.corrupts:
            bundle[len(bundle) // 2] ^= 1
        return MoveStatus.DONE

    def _load(self, move: Move, fault: Fault) -> MoveStatus:
        """Lease, look again, verify, copy, look once more (I7)."""
        location = Location(move.slot, move.epoch)
        if not self._leases.acquire_one(move.key, location):
            return MoveStatus.FAILED_STALE
        try:
            bundle = self._bundles[move.slot]
            if not self._is_intact(move, bundle):
                return MoveStatus.FAILED_CORRUPT
            self._board.publish(move.number, MoveStatus.ENQUEUED)
            self._copy(move, fault, bundle, self._pages[move.page])
            return MoveStatus.DONE if self._leases.is_current(location) else MoveStatus.FAILED_TORN
        finally:
            self._leases.release_one(move.slot)

    def _is_granted(self, move: Move) -> bool:
        """Tell whether a slot is still granted as the move was told: epochs are odd while it is written."""
        return move.epoch % 2 == 1 and self._arena.epoch(move.slot) == move.epoch

    def _is_intact(self, move: Move, bundle: NDArray[numpy.uint8]) -> bool:
        if not self._mechanisms.verifies_loads:
            return True
        if self._arena.incarnation != self._incarnation:  # another server adopted it: all are looked at anew
            self._incarnation = self._arena.incarnation
            self._verified.clear()
        if not self._verifies_all and self._verified.get(move.slot) == move.epoch:
            return True
        if bundle_checksum(bundle.data, move.key, self._part) != self._arena.checksum(move.slot, self._part):
            return False
        self._verified[move.slot] = move.epoch
        return True

    def _copy(
        self, move: Move, fault: Fault, source: NDArray[numpy.uint8], target: NDArray[numpy.uint8]
    ) -> None:
        if self._injection is None:
            _copy_in_pieces(source, target)
            return
        half = len(source) // 2
        _copy_in_pieces(source[:half], target[:half])
        if fault.copy_delay_s:
            self._closing.wait(fault.copy_delay_s)
        if self._injection.during_copy is not None:
            self._injection.during_copy(move)
        _copy_in_pieces(source[half:], target[half:])


def _copy_in_pieces(source: NDArray[numpy.uint8], target: NDArray[numpy.uint8]) -> None:
    for start in range(0, len(source), PIECE_BYTES):
        numpy.copyto(target[start : start + PIECE_BYTES], source[start : start + PIECE_BYTES])
