"""TierStats: what the HostTier counts, for the metrics."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class TierStats:
    """Counters since the start; each reason is a word."""

    num_saved_pages: int = 0
    num_loaded_pages: int = 0
    failed_saves: Counter[str] = field(default_factory=Counter)
    failed_loads: Counter[str] = field(default_factory=Counter)
    skipped_saves: Counter[str] = field(default_factory=Counter)
    """Pages that were not saved though the policy wanted it: `no_grant`, `busy` (they left the device before
    their turn came), `no_parent`."""
    num_lost_pages: int = 0
    """Evicted from the device without a copy anywhere (I11)."""
