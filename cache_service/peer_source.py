"""PeerSource: pages out of a peer's arena: leased there, read one-sided, given back, verified (FETCH, I7).

Asked by the Fetcher's threads; a thread of its own does the work, batch after batch.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_service.arena_safety import ArenaSafety
from cache_service.breaker import Breaker
from cache_service.injection import MessageInjection
from cache_service.messages import (
    PROTOCOL_VERSION,
    Done,
    Leased,
    LeasedPage,
    LeasePages,
    Refused,
    ReleasePages,
    ReportCorrupt,
)
from cache_service.page_records import Location
from cache_service.peer_connection import PeerConnection, PeerLostError
from cache_service.remote import GetResult, GetStatus, PageBuffer, RecordLayout, verify
from cache_service.remote_worker import Batch, RemoteWorker
from cache_service.transfer import ReadStatus, RemoteRun, Transfer

logger = logging.getLogger(__name__)

MAX_PART_PAGES = 256
MAX_PART_BYTES = 64 << 20
"""Leased and read at once: what has come is kept, whatever becomes of the next part."""
_QUIET_SLICE_S = 1.0
_FOREIGN = ("layout", "protocol_version")
"""Refusals of a peer that has no page for us, and never will."""


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
        self._transfer = transfer
        self._safety = safety
        self._clock = clock
        self._lock = threading.Lock()  # of the breaker and what follows
        self._num_calls = 0
        self._late: Batch[GetResult] | None = None
        """One that its caller has left at the deadline: until it ends, the thread does nothing else."""
        self._has_ended = threading.Event()
        self._segment = ""
        self._connection = PeerConnection(endpoint, cluster_secret, clock, injection)
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
        """Read part after part; what is left when one fails has failed."""
        is_over = False
        try:
            self._read(batch, pages, end_s)
            is_over = True
        finally:
            if not is_over:  # a bug, of ours or of the peer: what is leased ends with the connection
                self._connection.drop()

    def _read(self, batch: Batch[GetResult], pages: Sequence[PageBuffer], end_s: float) -> None:
        num_pages = max(1, min(MAX_PART_PAGES, MAX_PART_BYTES // self._layout.slot_bytes))
        start = 0
        while start < len(pages):
            try:
                num_found = self._read_part(batch, start, pages[start : start + num_pages], end_s)
            except PeerLostError as error:
                self._connection.drop()  # what it has leased to us ends with it
                logger.warning("a peer is lost", extra={"peer": self.endpoint, "reason": str(error)})
                if self._clock() >= end_s:  # the caller may not have noticed yet
                    _fill_rest(batch, start, len(pages), GetStatus.TIMED_OUT)
                return
            if num_found is None:
                return
            if not num_found:
                _fill_rest(batch, start, len(pages), GetStatus.MISSING)
                return
            start += num_found

    def _read_part(
        self, batch: Batch[GetResult], start: int, pages: Sequence[PageBuffer], end_s: float
    ) -> int | None:
        """Fetch pages that one lease covers; return how many the peer has, None where it broke off."""
        answer = self._connection.ask(
            LeasePages(
                PROTOCOL_VERSION,
                self._reader,
                self._connection.connect(),
                self._layout.fingerprint,
                self._layout.bundle_bytes,
                self._layout.num_ranks,
                [page.key for page in pages],
            ),
            end_s,
            lambda: batch.is_cancelled,
        )
        if isinstance(answer, Refused):
            logger.warning("a peer lends nothing", extra={"peer": self.endpoint, "reason": answer.reason})
            if answer.code in _FOREIGN:
                return 0
            if answer.code == "fenced":
                self._connection.drop()
            return None
        if not isinstance(answer, Leased):
            raise PeerLostError(f"{self.endpoint} answered {type(answer).__name__} to LeasePages")
        if not answer.pages:
            return 0
        if len(answer.pages) > len(pages) or any(
            len(leased.checksums) != self._layout.num_ranks for leased in answer.pages
        ):
            raise PeerLostError(f"{self.endpoint} lent other pages than it was asked for")
        self._meet(answer.segment)
        runs = [
            RemoteRun(leased.address, page.data) for leased, page in zip(answer.pages, pages, strict=False)
        ]
        read = self._transfer.read(answer.segment, runs, max(0.0, end_s - self._clock()))
        while not read.quiet.wait(_QUIET_SLICE_S):
            pass  # the slots are written still: neither they nor the lease may go
        is_held = self._release(answer.lease_id, batch, end_s)
        if not is_held and self._safety.fencing:
            return None  # the peer may have given the slots to other pages while we read
        for place, (leased, status) in enumerate(zip(answer.pages, read.results, strict=True)):
            if status is ReadStatus.READ:
                batch.fill(start + place, self._verified(leased, pages[place]))
            elif status is ReadStatus.TIMED_OUT:
                batch.fill(start + place, GetResult(GetStatus.TIMED_OUT))
        return len(runs) if all(status is ReadStatus.READ for status in read.results) else None

    def _release(self, lease_id: int, batch: Batch[GetResult], end_s: float) -> bool:
        """Give a lease back; tell whether it was held until now."""
        if batch.is_cancelled:  # nobody waits for the pages; the peer does for its slots
            self._connection.tell(ReleasePages([lease_id]))
            return False
        answer = self._connection.ask(ReleasePages([lease_id]), end_s, lambda: batch.is_cancelled)
        return isinstance(answer, Done) and answer.count == 1

    def _verified(self, leased: LeasedPage, page: PageBuffer) -> GetResult:
        found = GetResult(GetStatus.FOUND, checksums=tuple(leased.checksums))
        result = verify(found, self._layout, page) if self._safety.verification else found
        if result.status is GetStatus.CORRUPT:
            self._connection.tell(ReportCorrupt(Location(leased.slot, leased.epoch), "fetch"))
        return result

    def _meet(self, segment: str) -> None:
        """Note where the peer's memory is; a peer that has restarted has another."""
        if self._segment and self._segment != segment:
            self._transfer.forget(self._segment)
        self._segment = segment

    def _leave(self) -> None:
        if self._segment:
            self._transfer.forget(self._segment)
        self._connection.close()
        self._has_ended.set()


def _fill_rest(batch: Batch[GetResult], start: int, end: int, status: GetStatus) -> None:
    for place in range(start, end):
        batch.fill(place, GetResult(status))
