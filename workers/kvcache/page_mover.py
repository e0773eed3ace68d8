"""PageMover: carries out one rank's SAVEs and LOADs, copies between its KVPool on a CPU and its node's arena.

The Engine starts moves and waits for LOADs, in its thread; a few threads of the mover do the copying, which
runs beside the step. What becomes of a move stands on the MoveBoard (I2, I5, I7).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

import numpy
from numpy.typing import NDArray

from cache_service.arena_format import bundle_checksum
from cache_service.keys import PageKey
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.arena_part import ArenaPart, MappedArena, MoverError, VerifyPolicy
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.move_queue import MoveQueue, MoveTimeoutError
from workers.kvcache.moves import NO_FAULT, Fault, Move, MoveInjection, MoveStats
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

logger = logging.getLogger(__name__)

NUM_THREADS = 1
"""Moves are short, and their threads wait for the interpreter between copies: on two free cores two of them
moved no more than one (1 MiB pages: 83 us a page either way) and took up to a third more processor time."""
LOAD_TIMEOUT_S = 30.0
"""The longest wait of a step for its LOADs, which are copies within this node's memory."""
PIECE_BYTES = 256 << 10
"""Copied at once: below the size of a core's own cache libc does not read a target that it overwrites (1 MiB:
46 us instead of 58 on a Zen 5 core), and the checksum of a SAVE finds the bytes near."""
RUN_BYTES = 1 << 20
"""Small pages are taken and ended together: a LOAD waits for others so much longer at most, 0.1 ms."""
_CLOSE_TIMEOUT_S = 30.0


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
        # numpy copies without the interpreter's lock and, unlike torch, without threads of its own.
        self._pages: NDArray[numpy.uint8] = pool.data.numpy()
        self._arena = ArenaPart(
            mapped, part, pool.layout.bundle_bytes, verify, verifies_loads=mechanisms.verifies_loads
        )
        self._queue = MoveQueue(board, pool.num_pages, pool.layout.bundle_bytes, part, injection)
        self._injection = injection
        self._max_run = 1 if injection is not None else max(1, RUN_BYTES // pool.layout.bundle_bytes)
        self._clock = clock
        self._threads = [
            threading.Thread(target=self._work, name=f"page-mover-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> MoveStats:
        """What moves came to."""
        return self._queue.stats

    @property
    def num_in_flight(self) -> int:
        """Moves that were started and are not over."""
        return self._queue.num_in_flight

    def start(self, op: SavePages | LoadPages) -> None:
        """Begin an op's moves, which end in their own time and order. Never blocks."""
        self._queue.add(op)

    def loading_pages(self) -> list[int]:
        """Return the pages of LOADs in flight."""
        return self._queue.loading_pages()

    def wait_for(self, pages: Iterable[int], timeout_s: float = LOAD_TIMEOUT_S) -> bool:
        """Let what the caller computes next come after the LOADs in flight of `pages`; True if any is.

        On return their verdicts are on the board. Raises MoveTimeoutError.
        """
        read = list(pages)
        awaited = self._queue.loads_of(read)
        moves = {load.move for load in awaited}
        if not self._queue.wait_until(
            lambda loads: not moves & {load.move for load in loads}, read, timeout_s
        ):
            raise MoveTimeoutError(
                f"LOADs {sorted(moves)} of pages {read} are not over after {timeout_s} s; restart the replica"
            )
        self.stats.num_waits["host"] += bool(awaited)
        return bool(awaited)

    def close(self) -> None:
        """End the threads: copies under way are finished, moves that have not begun fail. Idempotent."""
        self._queue.close()
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)
        if any(thread.is_alive() for thread in self._threads):
            raise MoveTimeoutError(f"{self.num_in_flight} moves did not end in {_CLOSE_TIMEOUT_S} s")
        self._arena.forget()

    # What the sanitizer asks.

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        return self._queue.status(move)

    def comes_first(self, move: int) -> bool:
        """Tell whether what the caller computes next comes after a LOAD that is not over: never, on a CPU."""
        return False

    def saved_checksum(self, slot: int) -> int | None:
        """Return the checksum of this rank's bundle in a slot, as its header has it; None: no arena yet."""
        return self._arena.saved_checksum(slot)

    def page_checksum(self, page: int, key: PageKey) -> int:
        """Return the checksum of a page's bytes in the pool as they are now."""
        return bundle_checksum(self._pages[page].data, key, self._arena.part)

    # The threads.

    def _work(self) -> None:
        while run := self._queue.next_run(self._max_run):
            began_s, moves = self._clock(), [started.move for started in run]
            statuses = [self._outcome(move) for move in moves]
            self._queue.end_all(moves, statuses, self._clock() - began_s)

    def _outcome(self, move: Move) -> MoveStatus:
        """Carry a move out; return what came of it."""
        try:
            return self._carry_out(move)
        except Exception:  # a thread's top: the move fails, the group hears of it and goes on
            logger.exception("move failed", extra={"move": move.number, "kind": move.kind})
            return MoveStatus.FAILED_IO

    def _carry_out(self, move: Move) -> MoveStatus:
        fault = self._injection.fault(move, self._arena.part) if self._injection else NO_FAULT
        self._queue.pause(fault.delay_s)
        if fault.fails or self._queue.is_closing or not self._arena.is_there() or not self._arena.has(move):
            return MoveStatus.FAILED_IO
        return self._save(move, fault) if move.kind == "save" else self._load(move, fault)

    def _save(self, move: Move, fault: Fault) -> MoveStatus:
        """Write the page's bytes, then the checksum that says they are there."""
        if not self._arena.is_granted(move):
            return MoveStatus.FAILED_STALE
        self._copy(move, fault, self._pages[move.page], self._arena.bundles[move.slot])
        # Of what the arena has, not the pool.
        if not self._arena.seal(move, self._arena.checksum(move)):
            return MoveStatus.FAILED_TORN
        if fault.corrupts:
            self._arena.flip_bit(move.slot)
        return MoveStatus.DONE

    def _load(self, move: Move, fault: Fault) -> MoveStatus:
        """Lease, look again, verify, copy, look once more (I7)."""
        if not self._arena.lease(move):
            return MoveStatus.FAILED_STALE
        try:
            if not self._arena.is_intact(move):
                return MoveStatus.FAILED_CORRUPT
            self._queue.verified(move)
            self._copy(move, fault, self._arena.bundles[move.slot], self._pages[move.page])
            return MoveStatus.DONE if self._arena.is_current(move) else MoveStatus.FAILED_TORN
        finally:
            self._arena.release(move)

    def _copy(
        self, move: Move, fault: Fault, source: NDArray[numpy.uint8], target: NDArray[numpy.uint8]
    ) -> None:
        if self._injection is None:
            _copy_in_pieces(source, target)
            return
        half = len(source) // 2
        _copy_in_pieces(source[:half], target[:half])
        self._queue.pause(fault.copy_delay_s)
        if self._injection.during_copy is not None:
            self._injection.during_copy(move)
        _copy_in_pieces(source[half:], target[half:])


def _copy_in_pieces(source: NDArray[numpy.uint8], target: NDArray[numpy.uint8]) -> None:
    for start in range(0, len(source), PIECE_BYTES):
        numpy.copyto(target[start : start + PIECE_BYTES], source[start : start + PIECE_BYTES])
