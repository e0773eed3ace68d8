"""PeerSource: pages out of a peer's arena, and when a peer that fails is left alone.

Asked by the Fetcher's threads; a thread of its own does the work, one PeerFetch after another.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_service.arena_safety import ArenaSafety
from cache_service.breaker import Breaker
from cache_service.injection import MessageInjection
from cache_service.peer_connection import PeerConnection, PeerLostError
from cache_service.peer_fetch import PeerFetch, Reading
from cache_service.remote import GetResult, GetStatus, PageBuffer, RecordLayout
from cache_service.remote_worker import Batch, RemoteWorker
from cache_service.transfer import Transfer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerPatience:
    """When a peer is left alone for a while."""

    max_failures: int = 2
    """Fetches in a row that come to nothing before the breaker opens."""
    retry_s: float = 0.5
    max_retry_s: float = 15.0


class PeerSource:
    """A Source. `reader` is the address of our own node; buffers lie in memory registered with `transfer`."""

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        reader: str,
        layout: RecordLayout,
        transfer: Transfer,
        safety: ArenaSafety,
        patience: PeerPatience | None = None,
        injection: MessageInjection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        patience = patience or PeerPatience()
        self.breaker = Breaker(patience.max_failures, patience.retry_s, patience.max_retry_s)
        self.endpoint = endpoint
        self.used_s = clock()
        """When it was last asked, or answered."""
        self._reader = reader
        self._layout = layout
        self._safety = safety
        self._clock = clock
        self._lock = threading.Lock()  # of the breaker and what follows
        self._num_calls = 0
        self._late: Batch[GetResult] | None = None
        """One that its caller has left at the deadline: until it ends, the thread does nothing else."""
        self._has_ended = threading.Event()
        self._connection = PeerConnection(endpoint, cluster_secret, clock, injection)
        self._reading = Reading(transfer)
        self._worker = RemoteWorker("peer-source", at_end=self._leave)

    @property
    def is_idle(self) -> bool:
        """Nobody waits for it."""
        return not self._num_calls

    @property
    def has_ended(self) -> bool:
        """Its thread and its connection are gone."""
        return self._has_ended.is_set()

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """See Source. A peer that has failed is not asked for a while, nor one whose last answer is late."""
        end_s = self._clock() + timeout_s
        if not self._begins():
            refused: Batch[GetResult] = Batch(len(pages))
            refused.finish(GetResult(GetStatus.FAILED))
            return refused
        batch = self._worker.run(
            lambda batch: self._work(batch, pages, end_s),
            len(pages),
            timeout_s,
            timed_out=GetResult(GetStatus.TIMED_OUT),
            failed=GetResult(GetStatus.FAILED),
        )
        self._ended(batch)
        return batch

    def close(self, timeout_s: float) -> bool:
        """End; False where a read or a call takes longer. Idempotent."""
        return self._worker.close(timeout_s)

    def _begins(self) -> bool:
        """Tell whether the peer may be asked now, and note it."""
        with self._lock:
            self.used_s = self._clock()
            if self._late is not None and self._late.is_under_way:
                self.breaker.failed(self.used_s)
                return False
            self._late = None
            is_allowed = self.breaker.allows(self.used_s)
            self._num_calls += is_allowed
            return is_allowed

    def _ended(self, batch: Batch[GetResult]) -> None:
        """Tell the breaker what came of a question."""
        is_vain = [result.status in (GetStatus.FAILED, GetStatus.TIMED_OUT) for result in batch.results]
        with self._lock:
            self._num_calls -= 1
            self.used_s = self._clock()
            if batch.is_under_way:
                self._late = batch
            if not is_vain or not all(is_vain):
                self.breaker.succeeded()
            elif batch.has_begun or self.breaker.state == "half_open":  # else it waited for others only
                self.breaker.failed(self.used_s)

    # In the worker's thread.

    def _work(self, batch: Batch[GetResult], pages: Sequence[PageBuffer], end_s: float) -> None:
        fetch = PeerFetch(
            self._connection,
            self._reading,
            self._reader,
            self._layout,
            self._safety,
            self._clock,
            batch,
            pages,
            end_s,
        )
        is_over = False
        try:
            fetch.run()
            is_over = True
        except PeerLostError as error:
            logger.warning("a peer is lost", extra={"peer": self.endpoint, "reason": str(error)})
            if self._clock() >= end_s:  # the caller may not have noticed yet
                fetch.fill_rest(GetStatus.TIMED_OUT, fetch.num_settled)
        finally:
            if not is_over:  # what is leased ends with the connection
                self._connection.drop()

    def _leave(self) -> None:
        self._reading.close()
        self._connection.close()
        self._has_ended.set()
