"""FetchStats: what the Prefetcher counts. It writes, workers.metrics reads."""

from collections import Counter
from dataclasses import dataclass, field

from workers.kvcache.arrivals import SourceKind


@dataclass(slots=True)
class FetchStats:
    """Counters since the start, of pages unless said otherwise."""

    num_fetches: Counter[SourceKind] = field(default_factory=Counter)
    """Calls."""
    fetched_pages: Counter[SourceKind] = field(default_factory=Counter)
    num_bytes: Counter[SourceKind] = field(default_factory=Counter)
    seconds: dict[SourceKind, float] = field(default_factory=lambda: dict.fromkeys(("peer", "remote"), 0.0))
    """From each question to its answer."""
    failed_pages: Counter[tuple[SourceKind, str]] = field(default_factory=Counter)
    """Asked for in vain, by a FetchStatus, why there was no answer, or `lost`: none came at all."""
    skipped_pages: Counter[str] = field(default_factory=Counter)
    """Missing and not asked for: `no_source`, `slower` than computing, `busy`: too many are under way,
    `breaker_open`: the source has failed just now; or asked for, and `present` by then."""
