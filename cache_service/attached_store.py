"""AttachedStore: a remote store in use by one node: pages are put in the background, and got for the Fetcher.

Used by the CacheServer's thread but for `get`. A store that fails is left alone for a while.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from cache_service.arena_user import ArenaAccess
from cache_service.breaker import Breaker, BreakerState
from cache_service.inbox import Inbox
from cache_service.keys import PageKey
from cache_service.put_queue import PutLimits, PutPage, PutQueue
from cache_service.remote import GetResult, GetStatus, PageBuffer, PutStatus, RemoteStore
from cache_service.remote_keys import RemoteKeys
from cache_service.remote_worker import Batch
from cache_service.task_threads import TaskThreads

logger = logging.getLogger(__name__)

PUT_TIMEOUT_S = 10.0
QUIET_LOOK_S = 1.0
MAX_FAILURES, RETRY_S, MAX_RETRY_S = 3, 1.0, 30.0
"""Of puts, and of gets: so many vain calls in a row, and none is made for so long."""
MAX_LISTED_PER_TURN = 4_096
MAX_OLD_PER_TURN = 256
_IS_VAIN = (GetStatus.FAILED, GetStatus.TIMED_OUT)
_WHY_NOT_PUT = {
    PutStatus.FULL: "it is full",
    PutStatus.TIMED_OUT: f"no answer within {PUT_TIMEOUT_S:g} s",
    PutStatus.FAILED: "puts fail",
}
_IS_NOT_THERE = (GetStatus.MISSING, GetStatus.FOREIGN, GetStatus.CORRUPT)


class AttachedStore:
    """The Fetcher's Source for pages of the store. `listed` are pages that the store has from the start.

    `inbox` brings what threads found to the server's thread; `counts` are its counters by (name, reason).
    """

    def __init__(
        self,
        store: RemoteStore,
        listed: Sequence[PageKey],
        access: ArenaAccess,
        keys: RemoteKeys,
        inbox: Inbox,
        counts: Counter[tuple[str, str]],
        limits: PutLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self._access = access
        self._listed = list(reversed(listed))
        self._old = [entry.key for entry in access.store.stored()][::-1]
        """Pages that were in the arena before, the first last: they are put when there is room."""
        self._keys = keys
        self._inbox = inbox
        self._counts = counts
        self._clock = clock
        self._queue = PutQueue(access, keys, counts, limits)
        self._threads = TaskThreads("put", 1)
        self._is_putting = False
        self._at_rest = threading.Event()
        self._at_rest.set()
        self._is_over = False
        self._may_have_lost = False
        """It stopped taking pages, and not for lack of room: a master that is started again knows none."""
        self._put_breaker = Breaker(MAX_FAILURES, RETRY_S, MAX_RETRY_S)
        self._get_breaker = Breaker(MAX_FAILURES, RETRY_S, MAX_RETRY_S)
        self._lock = threading.Lock()  # of `_get_breaker`
        self._num_failures: Counter[str] = Counter()

    @property
    def put_breaker(self) -> BreakerState:
        """Whether pages are put, or the store is left alone after failures."""
        return self._put_breaker.state

    @property
    def get_breaker(self) -> BreakerState:
        """The same, of getting pages."""
        return self._get_breaker.state

    def wait_until_quiet(self, timeout_s: float) -> bool:
        """Tell whether, within the time, no put reads the arena any more."""
        return self._at_rest.wait(timeout_s)

    @property
    def num_waiting(self) -> int:
        """Pages that wait to be put."""
        return len(self._queue)

    def offer(self, keys: Sequence[PageKey]) -> None:
        """Have pages put that have come into the arena, parents first."""
        self._queue.offer(keys)
        self._put_next()

    def tick(self) -> bool:
        """Do what is due; tell whether there is more at once."""
        for _ in range(min(len(self._listed), MAX_LISTED_PER_TURN)):
            self._keys.add(self._listed.pop())
        if self._listed:
            return True
        for _ in range(min(len(self._old), MAX_OLD_PER_TURN)):
            if self._queue.is_half_empty:
                self._queue.offer([self._old.pop()])
        self._put_next()
        return bool(self._old) and self._queue.is_half_empty

    def end(self) -> None:
        """Put and get no more. The store is closed after this, which ends what is under way."""
        self._is_over = True
        self._queue.clear("detached")
        self._listed.clear()
        self._old.clear()
        self._keys.lose_all()
        self._threads.close(0.0)

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """See Source. From any thread."""
        with self._lock:
            is_allowed = self._get_breaker.allows(self._clock())
        if not is_allowed:
            skipped: Batch[GetResult] = Batch(len(pages))
            skipped.finish(GetResult(GetStatus.FAILED))
            self._inbox.put(lambda: self._skipped(len(pages)))
            return skipped
        batch = self.store.get(pages, timeout_s)
        statuses = [result.status for result in batch.results]
        with self._lock:
            if statuses and all(status in _IS_VAIN for status in statuses):
                self._get_breaker.failed(self._clock())
            else:
                self._get_breaker.succeeded()
        keys = [page.key for page in pages]
        self._inbox.put(lambda: self._got(keys, statuses))
        return batch

    def _skipped(self, num_pages: int) -> None:
        self._counts["gets", "skipped"] += num_pages

    def _got(self, keys: list[PageKey], statuses: list[GetStatus]) -> None:
        """Learn from a get what the store has."""
        self._count_failures()
        for key, status in zip(keys, statuses, strict=True):
            self._counts["gets", status.value] += 1
            if self._is_over:
                continue
            if status is GetStatus.FOUND:
                self._keys.add(key)
            elif status in _IS_NOT_THERE:
                self._keys.lose(key)

    def _put_next(self) -> None:
        """Put a batch unless one is under way."""
        if self._is_over or self._is_putting or not self._queue.has_page():
            return
        if not self._put_breaker.allows(self._clock()):
            return
        self._is_putting = True
        self._at_rest.clear()
        pages = self._queue.take()
        self._threads.run(lambda: self._put(pages))

    def _put(self, pages: list[PutPage]) -> None:
        """Put a batch, and tell when it has ended and when it is quiet. In the put's thread."""
        began_s = self._clock()
        statuses: list[PutStatus | None] = [None] * len(pages)
        intact = [place for place, page in enumerate(pages) if page.is_intact()]
        batch = self.store.put([pages[place].record for place in intact], PUT_TIMEOUT_S)
        for place, status in zip(intact, batch.results, strict=True):
            statuses[place] = status
        seconds = self._clock() - began_s
        self._inbox.put(lambda: self._ended(pages, statuses, seconds))
        while not batch.quiet.wait(QUIET_LOOK_S):
            continue  # the slots may be read still (I7)
        self._at_rest.set()
        self._inbox.put(lambda: self._rested(pages))

    def _ended(self, pages: list[PutPage], statuses: list[PutStatus | None], seconds: float) -> None:
        found = self._count_failures()
        num_stored = statuses.count(PutStatus.STORED)
        self._counts["put_batches", ""] += 1
        self._counts["put_us", ""] += int(seconds * 1e6)
        self._counts["put_bytes", ""] += num_stored * pages[0].record.data.nbytes
        if self._is_over:
            self._counts["puts", "detached"] += len(pages)
            return
        self._queue.ended(pages, statuses)
        was_closed = self._put_breaker.state == "closed"
        if any(status in (PutStatus.STORED, PutStatus.PRESENT, None) for status in statuses):
            self._put_breaker.succeeded()
            if not was_closed:
                logger.info("the remote store takes pages again")
                if self._may_have_lost:
                    self._learn_anew()
            return
        self._put_breaker.failed(self._clock())
        if was_closed and self._put_breaker.state == "open":
            words = {_WHY_NOT_PUT[status] for status in statuses if status in _WHY_NOT_PUT}
            words |= {reason.removeprefix("put: ") for reason in found if reason.startswith("put: ")}
            why = ", ".join(sorted(words))
            self._may_have_lost = PutStatus.FULL not in statuses
            logger.warning(
                "the remote store takes no pages: it is left alone, but for a try now and then",
                extra={"why": why},
            )

    def _learn_anew(self) -> None:
        """Forget what the store had, but for what it lists, and put again what the arena has."""
        self._may_have_lost = False
        self._keys.lose_all()
        self._listed = list(reversed(self.store.known_keys()))
        self._old = [entry.key for entry in self._access.store.stored()][::-1]

    def _rested(self, pages: list[PutPage]) -> None:
        self._queue.release(pages)
        self._is_putting = False
        self._put_next()

    def _count_failures(self) -> Counter[str]:
        """Add what the store has counted since the last look, and return it."""
        failures = Counter(self.store.stats.failures)
        new = failures - self._num_failures
        for reason, count in new.items():
            self._counts["store_failures", reason] += count
        self._num_failures = failures
        return new
