"""CacheFeed: one CacheServer's relocations on their way into the NodePages of an API process.

Its Subscriber's thread shares the interpreter with the event loop: it keeps keys only, and decodes piece by
piece.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cache_service.changes_call import changes_since
from cache_service.one_call import CallError
from cache_service.relocation import Changes, Snapshot, Version
from cache_service.subscriber import Subscriber
from cluster.router.host_index import CacheAddress, NodePages

logger = logging.getLogger(__name__)

SILENCE_S = 5.0
"""A CacheServer silent for so long counts as lost: it speaks four times a second."""
RESYNC_S = 3.0
"""For the answer to what was missed."""


@dataclass(frozen=True)
class CacheFeedStats:
    """What an API process has of one CacheServer."""

    node: str
    is_heard: bool
    counter: int | None
    """Of the last relocation applied; None before the first snapshot."""
    lag: int | None
    """Relocations known to miss; None: of another incarnation, nobody knows."""
    num_restarts: int
    resyncs: dict[str, int]
    """Questions for what was missed, by how they were answered: `changes`, `snapshot`, `failed`."""
    num_host_pages: int
    num_remote_pages: int


class CacheFeed:
    """A KnownNode. `start`, then `close`, once each; the rest on the event loop or in any thread."""

    def __init__(
        self,
        address: CacheAddress,
        cluster_secret: bytes,
        *,
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.pages = NodePages()
        self._cluster_secret = cluster_secret
        self._silence_s = silence_s
        self._clock = clock
        self._was_heard = False
        self._subscriber = Subscriber(
            address.broadcasts, cluster_secret, self.pages, self._resync, clock=clock
        )

    def start(self) -> None:
        """Begin to listen."""
        self._subscriber.start()

    def close(self) -> None:
        """Stop listening; blocks while a resync is under way."""
        self._subscriber.close()

    def is_heard(self, now_s: float) -> bool:
        """Tell whether the CacheServer speaks, and is the one that told what is known."""
        follower = self._subscriber.follower
        silence_s = follower.silence_s(now_s)
        is_heard = follower.lag is not None and silence_s is not None and silence_s < self._silence_s
        if is_heard != self._was_heard:
            self._was_heard = is_heard
            if is_heard:
                logger.info("follows a cache server", extra={"node": self.address.node})
            else:
                logger.warning("no longer follows a cache server", extra={"node": self.address.node})
        return is_heard

    def stats(self) -> CacheFeedStats:
        """Return the figures of this moment."""
        subscriber, follower = self._subscriber, self._subscriber.follower
        stats, applied = follower.stats, follower.applied
        return CacheFeedStats(
            node=self.address.node,
            is_heard=self.is_heard(self._clock()),
            counter=None if applied is None else applied.counter,
            lag=follower.lag,
            num_restarts=stats.num_restarts,
            resyncs={
                "changes": stats.num_resyncs - stats.num_snapshots,
                "snapshot": stats.num_snapshots,
                "failed": subscriber.num_failed_resyncs,
            },
            num_host_pages=self.pages.num_in_arena,
            num_remote_pages=self.pages.num_remote,
        )

    def _resync(self, version: Version | None) -> Changes | Snapshot | None:
        """Called in the subscriber's thread."""
        try:
            return changes_since(self.address.calls, self._cluster_secret, version, RESYNC_S)
        except CallError as error:
            logger.debug("no resync", extra={"node": self.address.node, "why": str(error)})
            return None
