"""CudaPageMover: carries out one rank's SAVEs and LOADs where the pool's device copies by itself.

The Engine's thread starts moves and lets its stream wait for LOADs; it never waits itself. A thread for each
kind enqueues copies and takes up what is over. What becomes of a move stands on the MoveBoard (I2, I5 - I7).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from cache_service.arena_format import bundle_checksum
from cache_service.keys import PageKey
from cache_service.native.checksum import Checksums
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.arena_part import ArenaPart, MappedArena, VerifyPolicy
from workers.kvcache.arena_pins import PIECE_BYTES, ArenaPins, Bounce
from workers.kvcache.copy_checks import LoadChecks, SaveChecks, num_checksum_threads
from workers.kvcache.copy_lane import CopyLane
from workers.kvcache.copy_streams import CopyStreams, HostPinning
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.move_queue import Loading, MoveQueue, MoveTimeoutError
from workers.kvcache.moves import MoveInjection, MoveStats
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

logger = logging.getLogger(__name__)

ENQUEUE_TIMEOUT_S = 30.0
"""The longest wait of the host for LOADs to be enqueued, where a plan came too early: an error path."""
_CLOSE_TIMEOUT_S = 30.0


class CudaPageMover:
    """Copies pages of `pool` from and to the `part`-th bundle of the arena's slots, over `streams`.

    `mapped` tells the arena, None while there is none: moves fail until it is there, and it stays for good.
    It is pinned in the background, from then on until `close`. The caller closes the mover before arena,
    board and pool. `num_threads` help with checksums; None: as many as there are cores for. `is_driven`: the
    mover has no threads, the caller pins and advances the `lanes`.
    """

    def __init__(
        self,
        pool: KVPool,
        mapped: Callable[[], MappedArena | None],
        part: int,
        board: MoveBoard,
        *,
        streams: CopyStreams,
        pinning: HostPinning,
        num_threads: int | None = None,
        verify: VerifyPolicy = "always",
        mechanisms: Mechanisms = ALL_ON,
        injection: MoveInjection | None = None,
        clock: Callable[[], float] = time.monotonic,
        piece_bytes: int = PIECE_BYTES,
        is_driven: bool = False,
    ) -> None:
        bundle_bytes = pool.layout.bundle_bytes
        self._pool = pool
        self._streams = streams
        self._pinning = pinning
        self._piece_bytes = piece_bytes
        self._mechanisms = mechanisms
        self._is_driven = is_driven
        self._pins: ArenaPins | None = None
        self._pins_lock = threading.Lock()
        self._awaited: set[int] = set()  # LOADs that the compute stream waits for; the Engine's thread alone
        self._queue = MoveQueue(board, pool.num_pages, bundle_bytes, part, injection)
        self._arena = ArenaPart(mapped, part, bundle_bytes, verify, verifies_loads=mechanisms.verifies_loads)
        self._checksums = Checksums(num_checksum_threads() if num_threads is None else num_threads)
        self.stats.num_pinned_bytes = lambda: self._pins.num_bytes if self._pins else 0
        self.lanes = [
            CopyLane(
                checks,
                self._queue,
                self._arena,
                streams,
                self.pins,
                Bounce(pinning, bundle_bytes),
                bundle_bytes,
                mechanisms=mechanisms,
                injection=injection,
                clock=clock,
            )
            for checks in (
                LoadChecks(self._arena, self._checksums),
                SaveChecks(self._arena, self._checksums),
            )
        ]
        if self._arena.is_there():
            self.pins()
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"page-mover-{lane.kind}", daemon=True)
            for lane in self.lanes
            if not is_driven
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
        """Begin an op's moves, behind all that the compute stream has been given (I6). Never blocks.

        The last write of a page to be saved is among it, and the last step that may write a LOAD's target.
        """
        self._queue.add(op, self._streams.mark())

    def loading_pages(self) -> list[int]:
        """Return the pages of LOADs in flight."""
        return self._queue.loading_pages()

    def wait_for(self, pages: Iterable[int], timeout_s: float = ENQUEUE_TIMEOUT_S) -> bool:
        """Have the compute stream wait for the LOADs in flight of `pages`; True if any is. The host goes on.

        A plan reads a page once its LOAD is enqueued on every rank. One that came too early is waited for by
        the host, and counted; raises MoveTimeoutError.
        """
        read = list(pages)
        loads = self._queue.loads_of(read)
        if not loads:
            return False
        if not all(load.mark for load in loads) and self._mechanisms.enqueues_before_waits:
            self._wait_until_enqueued(read, timeout_s)
            loads = self._queue.loads_of(read)
        marked = [load for load in loads if load.mark is not None]
        if marked:
            last = max(marked, key=lambda load: load.mark_number)  # the others come before it
            assert last.mark is not None, "marked"
            self._streams.wait(last.mark)
            self.stats.num_waits["stream"] += 1
        self._awaited &= {load.move for load in self._queue.loads_of(self._queue.loading_pages())}
        self._awaited.update(load.move for load in marked)
        return True

    def pins(self) -> ArenaPins:
        """Return the pinned pieces of the arena, which is there; the first call begins to pin it."""
        with self._pins_lock:
            if self._pins is None:
                self._pins = ArenaPins(self._arena.arena, self._pinning, self._piece_bytes)
                if not self._is_driven:
                    self._pins.start(self._streams.enter_thread)
            return self._pins

    def close(self) -> None:
        """End the threads: copies under way are finished, moves that have not begun fail. Idempotent."""
        self._queue.close()
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)
        if any(thread.is_alive() for thread in self._threads):
            raise MoveTimeoutError(f"{self.num_in_flight} moves did not end in {_CLOSE_TIMEOUT_S} s")
        for lane in self.lanes if self._is_driven else ():
            self._run(lane)
        self._checksums.close()
        if self._pins is not None:
            self._pins.close()
        self._arena.forget()

    # What the sanitizer asks.

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        return self._queue.status(move)

    def comes_first(self, move: int) -> bool:
        """Tell whether what the compute stream is given next comes after a LOAD that is not over."""
        return move in self._awaited

    def saved_checksum(self, slot: int) -> int | None:
        """Return the checksum of this rank's bundle in a slot, as its header has it; None: no arena yet."""
        return self._arena.saved_checksum(slot)

    def page_checksum(self, page: int, key: PageKey) -> int:
        """Return the checksum of a page's bytes as the compute stream finds them. Waits for it."""
        octets = self._pool.data[page].cpu().numpy()  # a sanitizer's question: may wait
        return bundle_checksum(octets.data, key, self._arena.part)

    def _wait_until_enqueued(self, pages: Sequence[int], timeout_s: float) -> None:
        self.stats.num_waits["host"] += 1

        def are_enqueued(loads: Sequence[Loading]) -> bool:
            return all(load.mark for load in loads)

        if not self._queue.wait_until(are_enqueued, pages, timeout_s):
            raise MoveTimeoutError(
                f"LOADs of pages {list(pages)} are not enqueued after {timeout_s} s; restart the replica"
            )

    # The threads.

    def _work(self, lane: CopyLane) -> None:
        self._streams.enter_thread()
        while self._queue.wait_for_work(lane.kind):
            self._run(lane)

    def _run(self, lane: CopyLane) -> None:
        """Carry out what there is until nothing is left."""
        while True:
            try:
                if lane.advance():
                    continue
                mark = lane.oldest
                if mark is None:
                    return
                mark.synchronize()  # in C++; what is started meanwhile waits for the end of one batch
            except Exception:  # a thread's top: the moves fail, the group hears of it and goes on
                logger.exception("moves failed", extra={"kind": lane.kind})
                lane.fail()
