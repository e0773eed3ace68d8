"""FetchCosts: seconds that a FETCH will take and seconds that computing takes, as measured last (I10).

Owned by the Prefetcher in rank 0's step loop thread. Time is an argument.
"""

from dataclasses import dataclass
from typing import NamedTuple

from workers.kvcache.arrivals import SourceKind
from workers.kvcache.moves import MoveStats

FORGET_S = 60.0
"""A source not measured for so long counts as unknown: it may have been slow for a while only."""
MIN_PREFILL_TOKENS = 16
"""A step that computes fewer of a prompt says more about its fixed costs than about prompts."""
_KEPT = 0.8
"""Share of its weight that a sample keeps when the next one comes."""


@dataclass(frozen=True, slots=True)
class FirstGuesses:
    """What counts until something was measured."""

    peer_bytes_per_s: float = 500e6
    remote_bytes_per_s: float = 200e6
    peer_latency_s: float = 0.005
    """Of a FETCH of no bytes. It stays: what a source takes beyond it counts as its rate."""
    remote_latency_s: float = 0.02
    prefill_tokens_per_s: float = 2_000.0


class PageTimes(NamedTuple):
    """Seconds a page, as measured; None: not measured, or too long ago."""

    load_s: float | None
    peer_s: float | None
    remote_s: float | None


class Pace:
    """Seconds a unit: a running mean weighted by amount, in which the newest samples count most."""

    def __init__(self, first: float, forget_s: float | None = None) -> None:
        self._first = first
        self._forget_s = forget_s
        self._amount = 0.0
        self._seconds = 0.0
        self._measured_s = 0.0

    def measured(self, amount: float, seconds: float, now_s: float) -> None:
        """Take a sample in."""
        kept = _KEPT if self._is_known(now_s) else 0.0
        self._amount = kept * self._amount + amount
        self._seconds = kept * self._seconds + seconds
        self._measured_s = now_s

    def seconds(self, amount: float, now_s: float) -> float:
        """Return what so much will take."""
        known = self.known(now_s)
        return amount * (self._first if known is None else known)

    def known(self, now_s: float) -> float | None:
        """Return the measured seconds of a unit."""
        return self._seconds / self._amount if self._is_known(now_s) else None

    def _is_known(self, now_s: float) -> bool:
        is_old = self._forget_s is not None and now_s - self._measured_s > self._forget_s
        return self._amount > 0 and not is_old


class FetchCosts:
    """`page_bytes` is a page's size, all ranks together; `moves` are those of this process's rank."""

    def __init__(
        self,
        page_bytes: int,
        page_size: int,
        guesses: FirstGuesses | None = None,
        moves: MoveStats | None = None,
    ) -> None:
        guesses = guesses or FirstGuesses()
        self.page_bytes = page_bytes
        self._moves = moves
        self._page_size = page_size
        self._latency_s: dict[SourceKind, float] = {
            "peer": guesses.peer_latency_s,
            "remote": guesses.remote_latency_s,
        }
        self._sources: dict[SourceKind, Pace] = {
            "peer": Pace(page_bytes / guesses.peer_bytes_per_s, FORGET_S),
            "remote": Pace(page_bytes / guesses.remote_bytes_per_s, FORGET_S),
        }
        self._prefill = Pace(1 / guesses.prefill_tokens_per_s)

    def fetch_s(self, kind: SourceKind, num_pages: int, num_ahead: int, now_s: float) -> float:
        """Return what a FETCH of pages will take behind those under way from its kind, LOADs included."""
        load_s = (self._load_page_s or 0.0) * num_pages
        return self._latency_s[kind] + self._sources[kind].seconds(num_pages + num_ahead, now_s) + load_s

    def compute_s(self, num_pages: int, now_s: float) -> float:
        """Return what computing so many pages will take."""
        return self._prefill.seconds(num_pages * self._page_size, now_s)

    def fetched(self, kind: SourceKind, num_pages: int, num_ahead: int, seconds: float, now_s: float) -> None:
        """Take in what a FETCH has brought, and in what time."""
        if num_pages:
            moving_s = max(seconds - self._latency_s[kind], seconds / 2)
            self._sources[kind].measured(num_pages + num_ahead, moving_s, now_s)

    def prefilled(self, num_tokens: int, seconds: float, now_s: float) -> None:
        """Take in how long a step took that computed so many tokens of prompts."""
        if num_tokens >= MIN_PREFILL_TOKENS:
            self._prefill.measured(num_tokens, seconds, now_s)

    def page_times(self, now_s: float) -> PageTimes:
        """Return what the router wants to know."""
        peer, remote = self._sources["peer"], self._sources["remote"]
        return PageTimes(self._load_page_s, peer.known(now_s), remote.known(now_s))

    @property
    def _load_page_s(self) -> float | None:
        return None if self._moves is None else self._moves.page_s("load")
