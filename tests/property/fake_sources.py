"""FakeSources: peers and a remote store that bring pages into a FakeArena, late, in part, twice, or never."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cache_service.fetch_calls import FetchAnswer
from cache_service.keys import PageKey
from cache_service.messages import FetchResult, FetchStatus, WantedPage
from cache_service.page_records import Location
from cache_service.server_connection import CallFailure
from tests.property.fake_arena import Contents, FakeArena, checksum
from workers.kvcache.fetch_costs import FirstGuesses
from workers.kvcache.prefetcher import PrefetchPolicy
from workers.protocol import FetchHint, RequestId

PAGE_BYTES = 1000
LATENCY_S = 0.25
TOKEN_S = 2.0
"""What computing a token takes."""
PEERS = ("tcp://peer-0", "tcp://peer-1")


@dataclass(frozen=True)
class SourceOptions:
    """`speed`: how often a page comes each time; a step takes a second."""

    policy: PrefetchPolicy = "wait_complete"
    timeout_s: float = 5.0
    page_s: float = 1.0
    """What fetching a page takes, as answers tell."""
    speed: float = 1.0
    silent_ratio: float = 0.0
    """Of FETCHes: no answer ever."""
    failure_ratio: float = 0.0
    """Of pages, and of FETCHes that get no result at all."""
    twice_ratio: float = 0.0
    """Of answers."""
    put_ratio: float = 0.0
    """How often the remote store gets some page with all that it continues."""

    @property
    def guesses(self) -> FirstGuesses:
        rate = PAGE_BYTES / self.page_s
        return FirstGuesses(rate, rate, LATENCY_S, LATENCY_S, 1 / TOKEN_S)


@dataclass(eq=False)
class FakeFetch:
    number: int
    pages: list[WantedPage]
    peer: str | None
    ends_s: float
    is_silent: bool
    owner: RequestId | None
    results: list[FetchResult] = field(default_factory=list)
    is_answered: bool = False


class FakeSources:
    """RemotePages. The first peer has all pages, the second half of them, the store what was put there."""

    def __init__(
        self,
        arena: FakeArena,
        options: SourceOptions,
        chance: Random,
        page_size: int,
        make_parts: list[Callable[[tuple[int, ...]], Contents]],
    ) -> None:
        """`make_parts`: by rank, its part of a page of some tokens."""
        self.options = options
        self.now_s = 0.0
        self.is_hurried = False
        self.owner: RequestId | None = None
        """The request that is being submitted."""
        self.fetches: list[FakeFetch] = []
        self._arena = arena
        self._chance = chance
        self._page_size = page_size
        self._make_parts = make_parts
        self._remote: set[PageKey] = set()
        self._answers: list[FetchAnswer] = []

    def hints(self, num_pages: int) -> list[FetchHint]:
        """What a router might say, rightly or not."""
        pick = self._chance.choice
        return [
            FetchHint(pick([*PEERS, None]), self._chance.randint(1, num_pages + 1))
            for _ in range(pick([0, 1, 1, 2]))
        ]

    def is_remote(self, key: PageKey) -> bool:
        return key in self._remote

    def fetch(self, pages: Sequence[WantedPage], peer: str | None, timeout_s: float) -> int:
        assert pages and timeout_s > 0
        under_way = {page.key for fetch in self._under_way() for page in fetch.pages}
        assert under_way.isdisjoint(page.key for page in pages), "twice: a page is fetched that is on its way"
        for page in pages:
            assert page.parent == self._arena.parents.get(page.key, page.parent), (
                "a page has another's parent"
            )
        fetch_s = LATENCY_S + len(pages) * self.options.page_s
        compute_s = len(pages) * self._page_size * TOKEN_S
        assert fetch_s < compute_s, f"cost: a FETCH of {fetch_s} s for what is computed in {compute_s} s"
        self.fetches.append(
            FakeFetch(
                len(self.fetches) + 1,
                list(pages),
                peer,
                self.now_s + timeout_s,
                self._chance.random() < self.options.silent_ratio,
                self.owner,
            )
        )
        return len(self.fetches)

    def take_fetched(self) -> list[FetchAnswer]:
        answers, self._answers = self._answers, []
        return answers

    def move_on(self) -> None:
        """Bring pages; answer FETCHes that are over."""
        for fetch in self._chance.sample(self.fetches, len(self.fetches)):
            while not fetch.is_answered and (self.is_hurried or self._chance.random() < self.options.speed):
                self._advance(fetch)
                if not self.is_hurried:
                    break
        if self._arena.truth and self._chance.random() < self.options.put_ratio:
            key: PageKey | None = self._chance.choice(list(self._arena.truth))
            while key is not None:
                self._remote.add(key)
                key = self._arena.parents[key]

    def check_admitted(self, request_id: RequestId) -> None:
        """A request is not admitted before its FETCH is over, or it has waited for it long enough."""
        for fetch in self.fetches:
            is_over = fetch.is_answered or self.now_s >= fetch.ends_s
            assert is_over or fetch.owner != request_id or self.options.policy == "best_effort", (
                f"await: {request_id} is admitted while its FETCH {fetch.number} is under way"
            )

    def _under_way(self) -> list[FakeFetch]:
        return [fetch for fetch in self.fetches if not fetch.is_answered and self.now_s < fetch.ends_s]

    def _advance(self, fetch: FakeFetch) -> None:
        if len(fetch.results) < len(fetch.pages) and self.now_s < fetch.ends_s:
            self._bring(fetch, fetch.pages[len(fetch.results)])
            return
        fetch.is_answered = True
        if fetch.is_silent:
            return
        results = list(fetch.results)
        results += [FetchResult(FetchStatus.TIMED_OUT, None)] * (len(fetch.pages) - len(results))
        failed = self._chance.random() < self.options.failure_ratio
        seconds = LATENCY_S + len(fetch.pages) * self.options.page_s
        answer = FetchAnswer(fetch.number, CallFailure("timeout") if failed else results, seconds)
        self._answers += [answer] * (1 + (self._chance.random() < self.options.twice_ratio))

    def _has(self, peer: str | None, key: PageKey) -> bool:
        if peer is None:
            return key in self._remote
        return peer == PEERS[0] or key[0] % 2 == 0

    def _bring(self, fetch: FakeFetch, page: WantedPage) -> None:
        """What follows a page that does not come, does not come either."""
        status, location = self._try(fetch, page)
        is_here = status in (FetchStatus.FETCHED, FetchStatus.PRESENT)
        num_more = 1 if is_here else len(fetch.pages) - len(fetch.results)
        fetch.results += [FetchResult(status, location)] * num_more

    def _try(self, fetch: FakeFetch, page: WantedPage) -> tuple[FetchStatus, Location | None]:
        arena = self._arena
        if page.key in arena.index:
            return FetchStatus.PRESENT, arena.index[page.key]
        if self._chance.random() < self.options.failure_ratio:
            return self._chance.choice([FetchStatus.FAILED, FetchStatus.CORRUPT]), None
        if not self._has(fetch.peer, page.key):
            return FetchStatus.MISSING, None
        grant = arena.grant()
        if grant is None or (page.parent is not None and page.parent not in arena.index):
            if grant is not None:  # its parent had to go for it
                arena.free(grant.slot)
            return FetchStatus.NO_SLOT, None
        slot = arena.slots[grant.slot]
        slot.parts = {part: make(arena.truth[page.key]) for part, make in enumerate(self._make_parts)}
        slot.checksums = {part: checksum(contents) for part, contents in slot.parts.items()}
        arena._store(grant.slot, page.key, page.parent)
        return FetchStatus.FETCHED, arena.index[page.key]
