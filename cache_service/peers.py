"""Peers: the other nodes that this one fetches from, each with its connection, while they are of use.

An ArenaUser of the CacheServer's thread.
"""

import time
from collections import Counter
from collections.abc import Callable

from cache_service.arena_user import ArenaAccess
from cache_service.breaker import BreakerState
from cache_service.injection import MessageInjection
from cache_service.peer_source import PeerPatience, PeerSource
from cache_service.wire import Wire

IDLE_S = 300.0
"""A peer nobody has asked for so long is closed."""
MAX_PEERS = 64
_END_S = 1.0


class Peers:
    """`reader` is the address of our own node."""

    def __init__(
        self,
        wire: Wire,
        reader: str,
        cluster_secret: bytes,
        patience: PeerPatience | None = None,
        injection: MessageInjection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wire = wire
        self._reader = reader
        self._cluster_secret = cluster_secret
        self._patience = patience
        self._injection = injection
        self._clock = clock
        self._access: ArenaAccess | None = None
        self._sources: dict[str, PeerSource] = {}
        self._closing: list[PeerSource] = []

    def begin(self, access: ArenaAccess) -> None:
        """See ArenaUser."""
        self._access = access

    def end(self) -> bool:
        """See ArenaUser. The wire ends before, so that no read goes on."""
        self._access = None
        self._closing += self._sources.values()
        self._sources.clear()
        for source in self._closing:  # all are told before any is waited for
            source.close(0.0)
        end_s = time.monotonic() + _END_S
        self._closing = [
            source for source in self._closing if not source.close(max(0.0, end_s - time.monotonic()))
        ]
        return not self._closing

    def find(self, endpoint: str) -> PeerSource | None:
        """Return a peer to fetch from; None while the wire is not ready, or too many peers are in use."""
        source = self._sources.get(endpoint)
        transfer, access = self._wire.transfer, self._access
        if source is None and transfer is not None and access is not None and self._has_room():
            source = self._sources[endpoint] = PeerSource(
                endpoint,
                self._cluster_secret,
                self._reader,
                access.layout,
                transfer,
                access.arena.safety,
                self._patience,
                self._injection,
                self._clock,
            )
        return source

    def tick(self, now_s: float) -> None:
        """Close peers that nobody has asked for long."""
        for source in list(self._sources.values()):
            if source.is_idle and now_s - source.used_s >= IDLE_S:
                self._close(source)
        self._closing = [source for source in self._closing if not source.has_ended]

    def states(self) -> Counter[BreakerState]:
        """Return how many peers' breakers are in each state."""
        return Counter(source.breaker.state for source in self._sources.values())

    def _has_room(self) -> bool:
        """Make room for one more, by the peer unused for longest."""
        if len(self._sources) < MAX_PEERS:
            return True
        idle = [source for source in self._sources.values() if source.is_idle]
        if not idle:
            return False
        self._close(min(idle, key=lambda source: source.used_s))
        return True

    def _close(self, source: PeerSource) -> None:
        del self._sources[source.endpoint]
        source.close(0.0)
        self._closing.append(source)
