"""PrefixIndex: which replica's device holds which PageKeys, as far as this API process knows.

Fed by KVEvents in the replicas' receiver threads, read and overlaid with the router's own recent decisions on
the event loop. Each replica's set has one writer, its receiver thread; reads may be a step old: the worker is
right, a stale index costs a miss.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache_service.keys import PageKey
from workers.protocol import KVEventBatch, ReplicaId

OVERLAY_S = 10.0
"""A decision counts as held for so long; by then its KVEvents have come, or it was evicted or refused."""


@dataclass
class _Holdings:
    """One replica's pages: what it told, and what we sent its way."""

    incarnation: int | None = None
    version: int = 0
    keys: set[bytes] = field(default_factory=set)
    expected: dict[PageKey, float] = field(default_factory=dict)
    """Key -> when we stop expecting it."""
    expiries: deque[tuple[float, PageKey]] = field(default_factory=deque)


class PrefixIndex:
    """`overlay_s` 0 switches the overlay off, `takes_kv_events` False the feed: tests only."""

    def __init__(
        self, replicas: Sequence[ReplicaId], *, overlay_s: float = OVERLAY_S, takes_kv_events: bool = True
    ) -> None:
        self._holdings = {replica_id: _Holdings() for replica_id in replicas}
        self._overlay_s = overlay_s
        self._takes_kv_events = takes_kv_events
        self.num_gaps = 0
        """Snapshots asked for because events were missing."""

    # In the replica's receiver thread.

    def restart(self, replica_id: ReplicaId, incarnation: int, version: int, keys: list[bytes]) -> None:
        """Take a snapshot: all keys on the device at `version` of `incarnation`."""
        holdings = self._holdings[replica_id]
        if not self._takes_kv_events:
            keys = []
        holdings.incarnation, holdings.version, holdings.keys = incarnation, version, set(keys)

    def apply(self, replica_id: ReplicaId, batch: KVEventBatch) -> bool:
        """Take events in; return False where some are missing before them and a snapshot is needed.

        Events a snapshot already had may come again: the last one of each key decides, so replaying is safe.
        """
        holdings = self._holdings[replica_id]
        if batch.incarnation != holdings.incarnation:
            return False
        if not self._takes_kv_events or batch.version <= holdings.version:
            return True
        if batch.first_version > holdings.version:
            self.num_gaps += 1
            return False
        for event in batch.events:
            if event.kind == "stored":
                holdings.keys.update(event.keys)
            else:
                holdings.keys.difference_update(event.keys)
        holdings.version = batch.version
        return True

    def forget(self, replica_id: ReplicaId) -> None:
        """Drop all that a lost replica held."""
        holdings = self._holdings[replica_id]
        holdings.incarnation, holdings.version, holdings.keys = None, 0, set()

    # On the event loop.

    def expect(self, replica_id: ReplicaId, keys: Sequence[PageKey], now_s: float) -> None:
        """Note that a request with these pages was sent there: a burst of one prefix sticks together."""
        if self._overlay_s == 0:
            return
        holdings = self._holdings[replica_id]
        self._expire(holdings, now_s)
        until_s = now_s + self._overlay_s
        for key in keys:
            holdings.expected[key] = until_s
            holdings.expiries.append((until_s, key))

    def num_held(self, replica_id: ReplicaId, keys: Sequence[PageKey], now_s: float) -> int:
        """Return how many leading pages the replica holds, or will by the time they are needed."""
        holdings = self._holdings[replica_id]
        self._expire(holdings, now_s)
        for place, key in enumerate(keys):
            if key not in holdings.keys and key not in holdings.expected:
                return place
        return len(keys)

    @staticmethod
    def _expire(holdings: _Holdings, now_s: float) -> None:
        while holdings.expiries and holdings.expiries[0][0] <= now_s:
            until_s, key = holdings.expiries.popleft()
            if holdings.expected.get(key) == until_s:  # not renewed meanwhile
                del holdings.expected[key]
