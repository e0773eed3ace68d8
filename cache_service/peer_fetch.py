"""PeerFetch: pages that a peer is asked for: leased there, read one-sided, given back, verified (FETCH, I7).

They go in parts, each with a lease of its own. While one is read, the next is leased and the last one is
settled: known to have been leased until it was given back, verified, answered:

    lease 0 | read 0  | read 1            | read 2    |
            | lease 1 | lease 2, settle 0 | settle 1  | settle 2

Made and run in a PeerSource's thread; another one reads.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from cache_service.arena_safety import ArenaSafety
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
from cache_service.remote_worker import Batch
from cache_service.task_threads import TaskThreads
from cache_service.transfer import ReadStatus, RemoteRun, Transfer

logger = logging.getLogger(__name__)

MAX_PART_PAGES = 256
MAX_PART_BYTES = 64 << 20
"""Read at once, while as much is leased ahead. What has come is kept, whatever becomes of the rest."""
_SLICE_S = 1.0
_TIDY_S = 1.0
"""How long the answer to a question for a lease is waited for that nobody needs any more."""
_FOREIGN = ("layout", "protocol_version")
"""Refusals of a peer that has no page for us, and never will."""


class Reading:
    """A source's end of the wire: the thread that reads, and the peer's memory as it was read last."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._segment = ""
        self._threads = TaskThreads("peer-read", 1)

    def begin(self, segment: str, runs: list[RemoteRun], timeout_s: float) -> Future[Batch[ReadStatus]]:
        """Read in the thread; the last one is over."""
        if self._segment and self._segment != segment:  # a peer that has restarted has another
            self._transfer.forget(self._segment)
        self._segment = segment
        read: Future[Batch[ReadStatus]] = Future()

        def work() -> None:
            try:
                read.set_result(self._transfer.read(segment, runs, timeout_s))
            except BaseException as error:
                read.set_exception(error)

        self._threads.run(work)
        return read

    def close(self) -> None:
        """End the thread, which does nothing now."""
        self._threads.close(0.0)
        if self._segment:
            self._transfer.forget(self._segment)


@dataclass(frozen=True)
class _Part:
    """Pages that one lease covers, the first of them the batch's `start`-th."""

    start: int
    leased: Leased


@dataclass(frozen=True)
class _ReadPart:
    """A part whose bytes are here, as far as `statuses` say; the lease is being given back."""

    part: _Part
    statuses: list[ReadStatus]
    release_call: int


class PeerFetch:
    """`run` fills `batch` by `end_s`, as far as it can."""

    def __init__(
        self,
        connection: PeerConnection,
        reading: Reading,
        reader: str,
        layout: RecordLayout,
        safety: ArenaSafety,
        clock: Callable[[], float],
        batch: Batch[GetResult],
        pages: Sequence[PageBuffer],
        end_s: float,
    ) -> None:
        self.num_settled = 0
        """Pages of the batch that have their final results, or are past hope."""
        self._connection = connection
        self._reading = reading
        self._reader = reader
        self._layout = layout
        self._safety = safety
        self._clock = clock
        self._batch = batch
        self._pages = pages
        self._end_s = end_s
        self._part_len = max(1, min(MAX_PART_PAGES, MAX_PART_BYTES // layout.slot_bytes))
        self._lease_call: int | None = None
        """A question for the next part's lease that is not answered yet."""
        self._last: _ReadPart | None = None
        """Read, and not settled yet."""
        self._is_fenced = False
        """A lease had ended before it was given back."""

    def run(self) -> None:
        """Read part after part; what is left when one fails has failed. Raises PeerLostError."""
        try:
            self._incarnation = self._connection.connect()
            self._read_all()
        finally:
            self._settle()
        if self._lease_call is not None:
            self._give_back(self._lease_call)

    def _read_all(self) -> None:
        start = 0
        self._ask_for(start)
        while start < len(self._pages):
            part = self._next_part(start)
            if part is None:
                return
            if not part.leased.pages:
                self.fill_rest(GetStatus.MISSING, start)
                return
            start += len(part.leased.pages)
            if not self._read(part, start):
                return

    # Leases.

    def _ask_for(self, start: int) -> None:
        """Ask for the lease of the part that begins at `start`."""
        pages = self._pages[start : start + self._part_len]
        self._lease_call = self._connection.send(
            LeasePages(
                PROTOCOL_VERSION,
                self._reader,
                self._incarnation,
                self._layout.fingerprint,
                self._layout.bundle_bytes,
                self._layout.num_ranks,
                [page.key for page in pages],
            )
        )

    def _next_part(self, start: int) -> _Part | None:
        """Return what was leased, which may be nothing; None where the peer refuses."""
        if self._lease_call is None:
            self._ask_for(start)
        answer = self._lease_answer()
        if isinstance(answer, Refused) and answer.code == "busy" and self._last is not None:
            self._settle()  # the peer may have lent to us what it lends
            self._ask_for(start)
            answer = self._lease_answer()
        if isinstance(answer, Refused):
            extra = {"peer": self._connection.endpoint, "reason": answer.reason}
            logger.warning("a peer lends nothing", extra=extra)
            if answer.code in _FOREIGN:
                return _Part(start, Leased(0, "", []))
            if answer.code == "fenced":
                self._connection.drop()
            return None
        wanted = self._pages[start : start + self._part_len]
        if len(answer.pages) > len(wanted) or any(
            len(leased.checksums) != self._layout.num_ranks for leased in answer.pages
        ):
            raise PeerLostError(f"{self._connection.endpoint} lent other pages than it was asked for")
        return _Part(start, answer)

    def _lease_answer(self) -> Leased | Refused:
        call, self._lease_call = self._lease_call, None
        assert call is not None
        answer = self._connection.answer(call, self._end_s, lambda: self._batch.is_cancelled)
        if not isinstance(answer, Leased | Refused):
            raise PeerLostError(f"{self._connection.endpoint} answered {type(answer).__name__} to LeasePages")
        return answer

    def _give_back(self, call: int) -> None:
        """End a lease that was asked for and is of no use any more."""
        self._lease_call = None
        answer = self._connection.answer(call, self._clock() + _TIDY_S, lambda: False)
        if isinstance(answer, Leased) and answer.pages:
            self._connection.tell(ReleasePages([answer.lease_id]))

    # Bytes.

    def _read(self, part: _Part, end: int) -> bool:
        """Read a part and begin to give it back; settle the last one meanwhile. Tell whether all is here."""
        leased, pages = part.leased.pages, self._pages[part.start : end]
        runs = [RemoteRun(page.address, buffer.data) for page, buffer in zip(leased, pages, strict=True)]
        timeout_s = max(0.0, self._end_s - self._clock())
        read = self._reading.begin(part.leased.segment, runs, timeout_s)
        try:
            if len(leased) == self._part_len and end < len(self._pages):
                self._ask_for(end)  # a peer that lent fewer has no more, or lends no more at once
            self._settle()
        finally:
            while not read.done():
                wait([read], _SLICE_S)
            batch = read.result()
            while not batch.quiet.wait(_SLICE_S):
                pass  # the slots are written still: neither they nor the lease may go
        release = ReleasePages([part.leased.lease_id])
        if self._batch.is_cancelled:  # nobody waits for the pages; the peer does for its slots
            self._connection.tell(release)
            return False
        self._last = _ReadPart(part, batch.results, self._connection.send(release))
        return not self._is_fenced and all(status is ReadStatus.READ for status in batch.results)

    def _settle(self) -> None:
        """Verify and answer the pages of the last part, if its lease was held until it was given back."""
        last, self._last = self._last, None
        if last is None or self._batch.is_cancelled:
            return
        start, leased = last.part.start, last.part.leased.pages
        results = [
            self._verified(page, self._pages[place]) if status is ReadStatus.READ else _NOT_READ[status]
            for place, (page, status) in enumerate(zip(leased, last.statuses, strict=True), start)
        ]
        answer = self._connection.answer(last.release_call, self._end_s, lambda: self._batch.is_cancelled)
        is_held = isinstance(answer, Done) and answer.count == 1
        if is_held or not self._safety.fencing:
            for place, result in enumerate(results, start):
                self._batch.fill(place, result)
        else:  # the slots may have been other pages' while we read
            self._is_fenced = True
        self.num_settled = start + len(leased)

    def _verified(self, leased: LeasedPage, page: PageBuffer) -> GetResult:
        found = GetResult(GetStatus.FOUND, checksums=tuple(leased.checksums))
        result = verify(found, self._layout, page) if self._safety.verification else found
        if result.status is GetStatus.CORRUPT:
            self._connection.tell(ReportCorrupt(Location(leased.slot, leased.epoch), "fetch"))
        return result

    def fill_rest(self, status: GetStatus, start: int) -> None:
        """Answer all pages from `start` on."""
        for place in range(start, len(self._pages)):
            self._batch.fill(place, GetResult(status))


_NOT_READ = {
    ReadStatus.TIMED_OUT: GetResult(GetStatus.TIMED_OUT),
    ReadStatus.FAILED: GetResult(GetStatus.FAILED),
}
