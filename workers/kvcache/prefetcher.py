"""Prefetcher: has a prompt's missing pages brought into the node's arena before the request is admitted.

Owned by the KVCacheManager in rank 0's step loop thread. It decides from where, by measured cost (I10), and
how long a request waits; the node's CacheServer gets the bytes. No torch, no sockets; time is an argument.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cache_service.breaker import Breaker
from cache_service.fetch_calls import FetchAnswer
from cache_service.keys import PageKey
from cache_service.messages import FetchStatus, WantedPage
from cache_service.server_connection import CallFailure
from workers.kvcache.arrivals import Arrivals, SourceKind
from workers.kvcache.fetch_costs import FetchCosts
from workers.kvcache.fetch_stats import FetchStats
from workers.kvcache.host_cache import RemotePages
from workers.kvcache.page_pool import Safety
from workers.kvcache.rows import KeyedTokens
from workers.protocol import FetchHint

PrefetchPolicy = Literal["best_effort", "wait_complete", "timeout"]
"""How long a request waits in the queue for its pages to be fetched: see WorkerConfig.prefetch_policy."""

MAX_PAGES_IN_FLIGHT = 4096
"""Of all FETCHes together."""
MIN_PATIENCE_S = 0.5
"""A request waits as long as computing the pages would take, but so long at least: a source needs a moment to
say that it has them not."""
MIN_BYTES_PER_S = 100e6
"""Under `timeout`: each page is allowed the time that its bytes take at this rate."""
MARGIN_S = 0.05
"""So long before a request has waited enough, its FETCH has to tell what has come until then."""
GRACE_S = 1.0
"""So long after its end a FETCH without an answer is given up: the client has its own, shorter deadline."""
SOURCE_RETRY_S = 1.0
MAX_SOURCE_RETRY_S = 16.0
"""A source that failed is left alone so long; the pause doubles up to this."""


class Reach(NamedTuple):
    """How many leading pages of a prompt are there already."""

    num_local: int
    """On the device or in the arena."""
    num_stored: int
    """In the arena: it takes a page only with all that it continues."""


@dataclass(frozen=True, slots=True)
class PrefetchOptions:
    """What the user chose."""

    policy: PrefetchPolicy = "wait_complete"
    timeout_s: float = 0.5
    """Under `timeout`, beside what each page is allowed."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """Pages on their way into the arena."""

    peer: str | None
    kind: SourceKind
    keys: list[PageKey]
    num_ahead: int
    """Pages of its kind that were under way when it began."""
    ends_s: float
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Prefetch:
    """One request's wait for pages from elsewhere."""

    keys: list[PageKey]
    tenant: int
    sources: list[FetchHint]
    """Not tried yet, best first."""
    deadline_s: float
    is_blocking: bool
    """The request waits for it."""
    fetch: _Fetch | None = None
    """What it waits for: its own, or one that brings some of its pages for another request."""

    @property
    def is_awaited(self) -> bool:
        """Tell whether the request is still to wait."""
        return self.is_blocking and self.fetch is not None

    def end(self) -> None:
        """Wait no more: the request was admitted, or has ended. What is under way goes on for others."""
        self.fetch = None
        self.sources.clear()


class Prefetcher:
    """`reach` tells how much of a prompt is there; `arrivals` hears where pages were put."""

    def __init__(
        self,
        remote: RemotePages,
        reach: Callable[[Sequence[PageKey]], Reach],
        arrivals: Arrivals,
        costs: FetchCosts,
        page_size: int,
        options: PrefetchOptions,
        safety: Safety | None = None,
    ) -> None:
        self.stats = FetchStats()
        self.costs = costs
        self._remote = remote
        self._reach = reach
        self._arrivals = arrivals
        self._page_size = page_size
        self._options = options
        self._safety = safety or Safety()
        self._fetches: dict[int, _Fetch] = {}  # by number
        self._on_their_way: dict[PageKey, _Fetch] = {}  # no page is fetched twice at a time
        self._live: list[Prefetch] = []
        self._breakers: dict[str | None, Breaker] = {}  # of sources that have failed last

    @property
    def num_pages_in_flight(self) -> int:
        """Pages asked for without an answer yet."""
        return len(self._on_their_way)

    def begin(
        self, tokens: KeyedTokens, num_pages: int, hints: Sequence[FetchHint], now_s: float
    ) -> Prefetch | None:
        """Have what is missing of a prompt's first pages fetched, if that is worth it; None: it is not."""
        keys = tokens.keys(0, num_pages)
        reach = self._reach(keys)
        num_missing = num_pages - reach.num_local
        if num_missing <= 0:
            return None
        prefetch = Prefetch(
            keys,
            tokens.tenant,
            self._sources(keys, reach, hints),
            now_s + self._patience_s(num_missing, now_s),
            self._options.policy != "best_effort" and self._safety.awaits_fetches,
        )
        has_source = bool(prefetch.sources)
        self._advance(prefetch, now_s)
        if prefetch.fetch is None:
            if not has_source:
                self.stats.skipped_pages["no_source"] += num_missing
            return None
        self._live.append(prefetch)
        return prefetch

    def settle(self, now_s: float) -> None:
        """Take in what came of FETCHes, and let go who has waited for them long enough."""
        for answer in self._remote.take_fetched():
            fetch = self._fetches.get(answer.number)
            if fetch is not None:  # else it was given up
                self._take(fetch, answer, now_s)
                self._end(answer.number, fetch)
        if not self._live and not self._fetches:
            return
        for number, fetch in list(self._fetches.items()):
            if now_s >= fetch.ends_s + GRACE_S and self._safety.fetch_deadlines:
                self.stats.failed_pages[fetch.kind, "lost"] += len(fetch.keys)
                self._failed(fetch.peer, now_s)
                self._end(number, fetch)
        for prefetch in self._live:
            if now_s >= prefetch.deadline_s and self._safety.fetch_deadlines:
                prefetch.end()
            elif prefetch.fetch is not None and prefetch.fetch.is_over:
                self._advance(prefetch, now_s)
        self._live = [prefetch for prefetch in self._live if prefetch.fetch is not None]

    def _patience_s(self, num_pages: int, now_s: float) -> float:
        if self._options.policy == "timeout":
            return self._options.timeout_s + num_pages * self.costs.page_bytes / MIN_BYTES_PER_S
        return max(MIN_PATIENCE_S, self.costs.compute_s(num_pages, now_s))

    def _sources(self, keys: list[PageKey], reach: Reach, hints: Sequence[FetchHint]) -> list[FetchHint]:
        """Return who has more of a prompt than is here: by the hints, then what is heard of the store.

        Each once, for the most that it is said to have.
        """
        num_remote = reach.num_stored
        while num_remote < len(keys) and self._remote.is_remote(keys[num_remote]):
            num_remote += 1
        num_pages: dict[str | None, int] = {}
        for source in (*hints, FetchHint(None, num_remote)):
            num_pages[source.peer] = max(source.num_pages, num_pages.get(source.peer, 0))
        return [FetchHint(peer, count) for peer, count in num_pages.items() if count > reach.num_local]

    def _advance(self, prefetch: Prefetch, now_s: float) -> None:
        """Have a request wait for a FETCH of some of its pages, or begin one from its next good source."""
        prefetch.fetch = None
        keys = prefetch.keys
        reach = self._reach(keys)
        if reach.num_local >= len(keys):
            return
        for key in keys[reach.num_stored :]:
            if key in self._on_their_way:
                prefetch.fetch = self._on_their_way[key]
                return
        while prefetch.sources and prefetch.fetch is None:
            prefetch.fetch = self._begin(prefetch, prefetch.sources.pop(0), reach, now_s)

    def _begin(self, prefetch: Prefetch, source: FetchHint, reach: Reach, now_s: float) -> _Fetch | None:
        """Ask a source for what is missing up to where it reaches.

            pages   |--- in the arena ---|--- on the device only ---|--- missing ---|
                    0                num_stored                 num_local          end
                                         |------------- wanted -------------------->|

        Pages that are on the device only are fetched too: the arena takes no orphans.
        """
        end = min(source.num_pages, len(prefetch.keys))
        num_missing = end - reach.num_local
        if num_missing <= 0:
            return None
        end = min(end, reach.num_stored + MAX_PAGES_IN_FLIGHT - self.num_pages_in_flight)
        if end <= reach.num_local:
            self.stats.skipped_pages["busy"] += num_missing
            return None
        kind: SourceKind = "remote" if source.peer is None else "peer"
        num_ahead = sum(len(fetch.keys) for fetch in self._fetches.values() if fetch.kind == kind)
        fetch_s = self.costs.fetch_s(kind, end - reach.num_stored, num_ahead, now_s)
        compute_s = self.costs.compute_s(end - reach.num_local, now_s)
        left_s = prefetch.deadline_s - MARGIN_S - now_s
        if left_s <= 0 or (fetch_s >= min(compute_s, left_s) and self._safety.weighs_fetches):
            self.stats.skipped_pages["slower"] += num_missing
            return None
        breaker = self._breakers.get(source.peer)
        if breaker is not None and not breaker.allows(now_s):
            self.stats.skipped_pages["breaker_open"] += num_missing
            return None
        wanted = prefetch.keys[reach.num_stored : end]
        parents = [prefetch.keys[reach.num_stored - 1] if reach.num_stored else None, *wanted[:-1]]
        pages = [
            WantedPage(key, parent, self._page_size, prefetch.tenant)
            for key, parent in zip(wanted, parents, strict=True)
        ]
        fetch = _Fetch(source.peer, kind, wanted, num_ahead, now_s + left_s)
        self._fetches[self._remote.fetch(pages, source.peer, left_s)] = fetch
        self._on_their_way.update(dict.fromkeys(wanted, fetch))
        self.stats.num_fetches[kind] += 1
        return fetch

    def _take(self, fetch: _Fetch, answer: FetchAnswer, now_s: float) -> None:
        if isinstance(answer.outcome, CallFailure):
            self.stats.failed_pages[fetch.kind, answer.outcome.reason] += len(fetch.keys)
            self._failed(fetch.peer, now_s)
            return
        num_fetched = 0
        statuses = {result.status for result in answer.outcome}
        for key, result in zip(fetch.keys, answer.outcome, strict=True):
            if result.status is FetchStatus.FETCHED:
                num_fetched += 1
                if result.location is not None:
                    self._arrivals.add(key, result.location, fetch.kind)
            elif result.status is FetchStatus.PRESENT:
                self.stats.skipped_pages["present"] += 1
                if result.location is not None:
                    self._arrivals.add(key, result.location, "host")
            else:
                self.stats.failed_pages[fetch.kind, result.status.name.lower()] += 1
        self.stats.fetched_pages[fetch.kind] += num_fetched
        self.stats.num_bytes[fetch.kind] += num_fetched * self.costs.page_bytes
        self.stats.seconds[fetch.kind] += answer.seconds
        self.costs.fetched(fetch.kind, num_fetched, fetch.num_ahead, answer.seconds, now_s)
        told = statuses - {FetchStatus.NO_SLOT, FetchStatus.PRESENT}  # which say nothing of the source
        if not told:
            if fetch.peer in self._breakers:
                self._breakers[fetch.peer].told_nothing()
        elif told <= {FetchStatus.FAILED, FetchStatus.TIMED_OUT}:
            self._failed(fetch.peer, now_s)
        else:
            self._breakers.pop(fetch.peer, None)

    def _failed(self, peer: str | None, now_s: float) -> None:
        """Leave a source alone for a while."""
        breaker = self._breakers.setdefault(peer, Breaker(1, SOURCE_RETRY_S, MAX_SOURCE_RETRY_S))
        breaker.failed(now_s)

    def _end(self, number: int, fetch: _Fetch) -> None:
        fetch.is_over = True
        del self._fetches[number]
        for key in fetch.keys:
            del self._on_their_way[key]
