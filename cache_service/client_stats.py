"""ClientStats: what a CacheClient counts; its metrics read it."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ClientStats:
    """Counters since the start, each written by one thread. Those of calls are the connection's."""

    num_hits: int = 0
    """Pages leased."""
    misses: Counter[str] = field(default_factory=Counter)
    """Pages and grants that could not be had: `stale`, `no_grant`, `no_server`, `replaced`."""
    commits: Counter[str] = field(default_factory=Counter)
    """Pages told to the server, by what came of it: a CommitStatus or why there was no answer."""
    num_attaches: int = 0
