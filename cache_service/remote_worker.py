"""RemoteWorker: a thread in which a store's blocking calls run, so that every caller keeps its deadline."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")


class Batch(Generic[T]):
    """One call's results, in order, and whether its buffers are the caller's again.

    The worker's side fills it page by page; a page that is not there at the deadline counts as timed out,
    even if it arrives later.
    """

    def __init__(self, num_pages: int) -> None:
        self.results: list[T] = []
        """Final once the call has returned."""
        self.quiet = threading.Event()
        """Set once nothing reads or writes the buffers any more; where all went well it is at the return."""
        self._over = threading.Event()
        self._filled: list[T | None] = [None] * num_pages
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_held = False
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """The caller has gone, or the store closes."""
        return self._is_cancelled

    @property
    def has_begun(self) -> bool:
        """The worker has taken it up; else it waited in vain behind others."""
        return self._has_begun

    @property
    def is_under_way(self) -> bool:
        """The worker has begun and not ended."""
        return self._has_begun and not self._over.is_set()

    def fill(self, place: int, result: T) -> None:
        """Answer one page, whose buffer is not touched afterwards. In the worker's thread."""
        self._filled[place] = result

    def begin(self) -> bool:
        """Take the batch up, unless it was cancelled. In the worker's thread."""
        with self._lock:
            self._has_begun = not self._is_cancelled
            return self._has_begun

    def cancel(self) -> None:
        """Tell the worker's side to end as soon as it can. From any thread."""
        with self._lock:
            self._is_cancelled = True
            if not self._has_begun:
                self._over.set()
                self.quiet.set()

    def hold(self) -> None:
        """Say that the buffers may be written until `let_go`, beyond the work. In the worker's thread."""
        self._is_held = True

    def let_go(self) -> None:
        """End a hold: whoever could write the buffers is proven gone."""
        self.quiet.set()

    def end(self) -> None:
        """Note that the work has ended. In the worker's thread."""
        self._over.set()
        if not self._is_held:
            self.quiet.set()

    def wait(self, timeout_s: float) -> bool:
        """Tell whether the work ends in time, or was never begun. In the caller's thread."""
        return self._over.wait(timeout_s)

    def finish(self, unanswered: T) -> None:
        """Settle the results. In the caller's thread."""
        self.cancel()
        self.results = [unanswered if result is None else result for result in self._filled]


class RemoteWorker:
    """Runs one batch after another, and `at_end` last of all."""

    def __init__(self, name: str, at_end: Callable[[], None] | None = None) -> None:
        self._at_end = at_end
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open_batches: set[Batch[Any]] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(
        self,
        work: Callable[[Batch[T]], None],
        num_pages: int,
        timeout_s: float,
        *,
        timed_out: T,
        failed: T,
    ) -> Batch[T]:
        """Let `work` fill a batch; return at the deadline at the latest. Called from any thread."""
        batch: Batch[T] = Batch(num_pages)

        def run() -> None:
            try:
                if batch.begin():
                    work(batch)
            finally:
                batch.end()

        with self._lock:
            if self._is_closed:
                batch.cancel()
            else:
                self._open_batches.add(batch)
                self._queue.put(run)
        is_in_time = batch.wait(timeout_s)
        batch.finish(failed if is_in_time else timed_out)
        with self._lock:
            self._open_batches.discard(batch)
        return batch

    def close(self, timeout_s: float) -> bool:
        """Cancel all batches and end the thread; False where its batch takes longer. Idempotent."""
        with self._lock:
            self._is_closed = True
            for batch in self._open_batches:
                batch.cancel()
            self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the thread's end, after `close`."""
        self._thread.join()

    def _run(self) -> None:
        while (run := self._queue.get()) is not None:
            try:
                run()
            except Exception:  # the thread's top: the batch's pages count as failed, the next go on
                logger.exception("a remote store's call failed")
        if self._at_end is not None:
            self._at_end()


def in_parts(
    batch: Batch[T], items: Sequence[Item], part_len: int, part_of: Callable[[Sequence[Item]], Sequence[T]]
) -> None:
    """Fill a batch part by part, until it is cancelled. In the worker's thread."""
    for start in range(0, len(items), part_len):
        if batch.is_cancelled:
            return
        for place, result in enumerate(part_of(items[start : start + part_len]), start):
            batch.fill(place, result)
