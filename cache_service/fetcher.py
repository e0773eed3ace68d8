"""Fetcher: brings pages from a peer or a remote store into this node's arena (FETCH).

Called by the CacheServer's thread; each source is asked in threads of its own, which put what came of it into
the inbox. Slots stay granted until their batch is quiet, whatever became of it (I7).
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cache_service.arena_user import ArenaAccess
from cache_service.fetch_lanes import FetchLanes
from cache_service.inbox import Inbox
from cache_service.keys import PageKey
from cache_service.messages import Fetch, Fetched, FetchResult, FetchStatus, WantedPage
from cache_service.page_records import CommitStatus, Entry, Grant, Location
from cache_service.remote import GetResult, GetStatus, PageBuffer
from cache_service.remote_worker import Batch

MAX_TIMEOUT_S = 60.0
"""A fetch that wants longer is answered by then."""
_RETURN_S = 0.02
"""Sources have less time than callers by so much: what has come by then is to be in the answer."""
_END_S = 1.0
"""How long the end of an arena waits for transfers into it."""
_STATUS_OF = {
    GetStatus.MISSING: FetchStatus.MISSING,
    GetStatus.FOREIGN: FetchStatus.MISSING,
    GetStatus.CORRUPT: FetchStatus.CORRUPT,
    GetStatus.TIMED_OUT: FetchStatus.TIMED_OUT,
    GetStatus.FAILED: FetchStatus.FAILED,
}
_STATUS_OF_COMMIT = {
    CommitStatus.COMMITTED: FetchStatus.FETCHED,
    CommitStatus.DUPLICATE: FetchStatus.PRESENT,  # a worker has saved it meanwhile
    CommitStatus.STALE: FetchStatus.FAILED,
    CommitStatus.NO_PARENT: FetchStatus.MISSING,
    CommitStatus.INCOMPLETE: FetchStatus.FAILED,
    CommitStatus.OVER_QUOTA: FetchStatus.NO_SLOT,
}


class Source(Protocol):
    """Where pages come from: a peer, or a remote store."""

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """Read pages, verified; one result a page, in order; as RemoteStore.get says."""
        ...


class FindSource(Protocol):
    """Tells the Fetcher whom to ask, in the server's thread."""

    def __call__(self, peer: str | None) -> Source | None:
        """Return the peer at an endpoint, or (None) the remote store; None: there is none."""
        ...


@dataclass(frozen=True)
class FetchLimits:
    """What is under way at once at most."""

    max_fetches: int = 64
    """Calls that wait for pages."""
    max_per_source: int = 8
    """Questions to one peer or store."""
    max_source_threads: int = 2
    """Of these, the ones that it is asked at once."""
    slots_ratio: float = 0.25
    """Part of the arena's slots that pages on their way take."""


@dataclass(eq=False)
class _Call:
    """One Fetch without an answer yet."""

    results: list[FetchResult | None]
    deadline_s: float
    reply: Callable[[Fetched], None]
    leased: list[int] = field(default_factory=list)
    """Slots of the pages that the wanted ones continue: they must not make room for these."""
    num_open: int = 0
    is_answered: bool = False


@dataclass(eq=False)
class _Page:
    """A page on its way. Whoever wants it meanwhile waits for it too."""

    wanted: WantedPage
    grant: Grant
    waiting: list[tuple[_Call, int]] = field(default_factory=list)
    """Calls, and the page's place in each."""
    checksums: tuple[int, ...] = ()
    """Once it has arrived."""
    children: list["_Page"] = field(default_factory=list)
    """Arrived pages that continue this one."""


@dataclass(eq=False)
class _Job:
    """Pages asked of one source at once."""

    pages: list[_Page]
    source: Source
    kind: str
    """`peer` or `store`, for the counters."""
    began_s: float
    deadline_s: float
    has_returned: threading.Event = field(default_factory=threading.Event)
    quiet: threading.Event = field(default_factory=threading.Event)


class Fetcher:
    """An ArenaUser. `counts` are the server's counters by (name, reason)."""

    def __init__(
        self,
        inbox: Inbox,
        find_source: FindSource,
        counts: Counter[tuple[str, str]],
        limits: FetchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox = inbox
        self._find_source = find_source
        self._counts = counts
        self._limits = limits or FetchLimits()
        self._clock = clock
        self._lanes = FetchLanes(self._limits.max_source_threads, self._limits.max_per_source)
        self._access: ArenaAccess | None = None
        self._calls: list[_Call] = []
        self._pages: dict[PageKey, _Page] = {}
        self._jobs: list[_Job] = []
        self._lingering: list[tuple[threading.Event, list[Grant]]] = []

    @property
    def num_calls(self) -> int:
        """Fetches without an answer yet."""
        return len(self._calls)

    @property
    def num_lingering(self) -> int:
        """Slots of failed transfers that may be written still."""
        return sum(len(grants) for _, grants in self._lingering)

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do, by the clock."""
        return min((call.deadline_s for call in self._calls), default=None)

    def begin(self, access: ArenaAccess) -> None:
        """See ArenaUser."""
        self._access = access

    def end(self) -> bool:
        """See ArenaUser; every fetch is answered. Sources end before, so that their batches do."""
        for call in list(self._calls):
            self._answer(call, FetchStatus.FAILED)
        jobs, self._jobs = self._jobs, []
        lingering, self._lingering = self._lingering, []
        self._pages.clear()
        self._access = None
        end_s = time.monotonic() + _END_S
        quiet = [quiet for quiet, _ in lingering]
        for job in jobs:  # its quiet is the batch's once it has returned
            if not job.has_returned.wait(max(0.0, end_s - time.monotonic())):
                return False
            quiet.append(job.quiet)
        return all(event.wait(max(0.0, end_s - time.monotonic())) for event in quiet)

    def close(self, timeout_s: float) -> bool:
        """End the threads; False where a source does not keep its deadline. After `end`, once."""
        return self._lanes.close(timeout_s)

    def fetch(self, request: Fetch, reply: Callable[[Fetched], None]) -> None:
        """Bring pages here; `reply` gets the answer by the deadline, or at once."""
        now_s = self._clock()
        is_short = request.timeout_s < MAX_TIMEOUT_S  # NaN is not
        timeout_s = request.timeout_s if is_short else MAX_TIMEOUT_S
        call = _Call([None] * len(request.pages), now_s + timeout_s, reply)
        access = self._access
        if access is None:
            self._calls.append(call)
            self._answer(call, FetchStatus.FAILED)
            return
        self._calls.append(call)
        new = self._sort(call, request.pages, access)
        if new:
            self._begin_job(call, request, new, access, now_s)
        if not call.num_open:
            self._answer(call, FetchStatus.FAILED)

    def tick(self, now_s: float) -> None:
        """Answer what is over its deadline; take back the slots of transfers that have come to rest."""
        for call in [call for call in self._calls if now_s >= call.deadline_s]:
            self._answer(call, FetchStatus.TIMED_OUT)
        if self._lingering and self._access is not None:
            still = []
            for quiet, grants in self._lingering:
                if quiet.is_set():
                    self._access.store.abort(self._access.group, grants)
                else:
                    still.append((quiet, grants))
            self._lingering = still

    # What to ask for.

    def _sort(self, call: _Call, pages: Sequence[WantedPage], access: ArenaAccess) -> list[int]:
        """Settle what is here, join what is on its way; return the places of pages to be asked for."""
        new: list[int] = []
        wanted: set[PageKey] = set()
        for place, page in enumerate(pages):
            (location,) = access.store.lookup([page.key])
            if location is not None:
                call.results[place] = FetchResult(FetchStatus.PRESENT, location)
                self._hold(call, page.key, location, access)
            elif page.key in self._pages:
                self._join(call, place, self._pages[page.key])
            elif page.key in wanted:
                call.results[place] = FetchResult(FetchStatus.FAILED, None)  # twice in one call
            elif page.parent is None or page.parent in self._pages or page.parent in wanted:
                wanted.add(page.key)
                new.append(place)
            else:
                (parent,) = access.store.lookup([page.parent])
                if parent is None:
                    call.results[place] = FetchResult(FetchStatus.MISSING, None)
                else:
                    self._hold(call, page.parent, parent, access)
                    wanted.add(page.key)
                    new.append(place)
        return new

    def _begin_job(
        self, call: _Call, request: Fetch, new: list[int], access: ArenaAccess, now_s: float
    ) -> None:
        """Ask the source for pages, as many as there is room for."""
        source = self._find_source(request.peer)
        max_slots = max(1, int(access.arena.spec.num_slots * self._limits.slots_ratio))
        num_allowed = max(0, max_slots - len(self._pages) - self.num_lingering)
        if source is None:
            num_allowed = 0
            self._counts["fetches_refused", "no_source"] += 1
        elif len(self._calls) > self._limits.max_fetches:
            num_allowed = 0
            self._counts["fetches_refused", "calls"] += 1
        elif not self._lanes.has_room(source):
            num_allowed = 0
            self._counts["fetches_refused", "source"] += 1
        elif num_allowed < len(new):
            self._counts["fetches_refused", "slots"] += 1
        allowed, refused = new[:num_allowed], new[num_allowed:]
        status = FetchStatus.FAILED if source is None else FetchStatus.NO_SLOT
        for place in refused:
            call.results[place] = FetchResult(status, None)
        grants = access.store.grant(access.group, len(allowed)) if allowed else []
        for place in allowed[len(grants) :]:
            call.results[place] = FetchResult(FetchStatus.NO_SLOT, None)
        if source is None or not grants:
            return
        pages = []
        for place, grant in zip(allowed, grants, strict=False):
            page = _Page(request.pages[place], grant)
            self._pages[page.wanted.key] = page
            self._join(call, place, page)
            pages.append(page)
        kind = "store" if request.peer is None else "peer"
        job = _Job(pages, source, kind, now_s, call.deadline_s)
        buffers = [PageBuffer(page.wanted.key, access.arena.slot_data(page.grant.slot)) for page in pages]
        self._jobs.append(job)
        self._lanes.run(source, lambda: self._ask(job, buffers))

    def _join(self, call: _Call, place: int, page: _Page) -> None:
        page.waiting.append((call, place))
        call.num_open += 1

    def _hold(self, call: _Call, key: PageKey, location: Location, access: ArenaAccess) -> None:
        if access.leases.acquire([key], [location]):
            call.leased.append(location.slot)

    # In a thread.

    def _ask(self, job: _Job, buffers: list[PageBuffer]) -> None:
        """Ask the source, and tell the core what came of it."""
        left_s = job.deadline_s - self._clock()
        left_s -= min(_RETURN_S, left_s / 10)
        results = [GetResult(GetStatus.TIMED_OUT if left_s <= 0 else GetStatus.FAILED)] * len(buffers)
        try:
            if left_s > 0:
                batch = job.source.get(buffers, left_s)
                results, job.quiet = batch.results, batch.quiet
            else:
                job.quiet.set()
        finally:  # where the source failed, nobody can tell when its buffers are quiet
            job.has_returned.set()
            self._inbox.put(lambda: self._arrived(job, results))

    # What has arrived.

    def _arrived(self, job: _Job, results: Sequence[GetResult]) -> None:
        self._lanes.ended(job.source)
        access = self._access
        if access is None or job not in self._jobs:  # the arena it went into is gone
            return
        self._jobs.remove(job)
        num_ranks = access.arena.spec.num_ranks
        results = [
            GetResult(GetStatus.FAILED)  # whatever it is, it is no page of this arena
            if result.status is GetStatus.FOUND and len(result.checksums) != num_ranks
            else result
            for result in results
        ]
        is_found = [result.status is GetStatus.FOUND for result in results]
        self._counts["fetch_bytes", job.kind] += sum(is_found) * access.arena.spec.slot_bytes
        self._counts["fetch_batches", job.kind] += 1
        self._counts["fetch_us", job.kind] += int((self._clock() - job.began_s) * 1e6)
        self._release([page.grant for page, found in zip(job.pages, is_found, strict=True) if not found], job)
        ready: deque[tuple[_Page, FetchStatus]] = deque()
        for page, result in zip(job.pages, results, strict=True):
            page.checksums = result.checksums
            parent = None if page.wanted.parent is None else self._pages.get(page.wanted.parent)
            if result.status is not GetStatus.FOUND:
                ready.append((page, _STATUS_OF[result.status]))
            elif parent is None:
                ready.append((page, FetchStatus.FETCHED))
            else:
                parent.children.append(page)
        while ready:
            page, status = ready.popleft()
            has_arrived = bool(page.checksums)
            location = None
            if status is FetchStatus.FETCHED:
                status, location = self._commit(page, access)
            elif has_arrived:  # what it continues did not come
                access.store.abort(access.group, [page.grant])
            self._settle(page, FetchResult(status, location))
            follows = FetchStatus.FETCHED if location is not None else status
            ready.extend((child, follows) for child in page.children)

    def _release(self, grants: list[Grant], job: _Job) -> None:
        """Give slots back whose pages have not come, once nothing writes them any more."""
        access = self._access
        assert access is not None
        if job.quiet.is_set() or not access.arena.safety.quiet:
            access.store.abort(access.group, grants)
        elif grants:
            self._lingering.append((job.quiet, grants))

    def _commit(self, page: _Page, access: ArenaAccess) -> tuple[FetchStatus, Location | None]:
        grant, wanted = page.grant, page.wanted
        for rank, checksum in enumerate(page.checksums):
            access.arena.set_checksum(grant.slot, rank, checksum)
        entry = Entry(grant.slot, grant.epoch, wanted.key, wanted.parent, wanted.length, wanted.tenant)
        (result,) = access.store.commit(access.group, [entry])
        return _STATUS_OF_COMMIT[result.status], result.location

    def _settle(self, page: _Page, result: FetchResult) -> None:
        del self._pages[page.wanted.key]
        for call, place in page.waiting:
            if not call.is_answered:
                call.results[place] = result
                call.num_open -= 1
                if not call.num_open:
                    self._answer(call, FetchStatus.FAILED)

    def _answer(self, call: _Call, otherwise: FetchStatus) -> None:
        """Reply with what has come of a call; what is open yet is `otherwise`."""
        call.is_answered = True
        self._calls.remove(call)
        unknown = FetchResult(otherwise, None)
        results = [unknown if result is None else result for result in call.results]
        for result in results:
            self._counts["fetched", result.status.name.lower()] += 1
        if self._access is not None:
            self._access.leases.release(call.leased)
        call.reply(Fetched(results))
