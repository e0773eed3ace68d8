"""LeaseAges: for how long slots have been leased, as seen by looking now and then. For metrics."""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from cache_service.arena import Arena


class LeaseAges:
    """Looks at the lease bytes when `look` is called; 4 bytes a slot."""

    def __init__(self, arena: Arena, now_s: float) -> None:
        self._arena = arena
        self._start_s = now_s
        self._since_s: NDArray[numpy.float32] = numpy.full(arena.spec.num_slots, numpy.nan, numpy.float32)
        """When each slot was first seen leased, counted from `_start_s`; NaN: it was not at the last look."""
        self.num_leased = 0
        self.oldest_s = 0.0
        """A lease given back and taken again between two looks counts as one."""

    def look(self, rows: Sequence[int], now_s: float) -> None:
        """Read the lease bytes of the rows that belong to processes: one pass over them."""
        elapsed_s = now_s - self._start_s
        is_leased = self._arena.leases[list(rows)].any(axis=0)
        self.num_leased = int(is_leased.sum())
        is_new = is_leased & numpy.isnan(self._since_s)
        self._since_s[is_new] = elapsed_s
        self._since_s[~is_leased] = numpy.nan
        oldest_s = elapsed_s - float(self._since_s[is_leased].min()) if self.num_leased else 0.0
        self.oldest_s = max(oldest_s, 0.0)  # rounded to 32 bits, the past may lie ahead
