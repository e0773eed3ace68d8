"""RemoteLeases: the pages of this node's arena that peers read over the wire, and when each lease ends (I7).

An ArenaUser of the CacheServer's thread. The lease bytes are the server's own. A lease ends when its reader
gives it back on the connection that it was had on, or once that connection is closed: then the reader's
incarnation is fenced first, so that nobody leases, gives back or counts anything in its name any more.
"""

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_service.arena_user import ArenaAccess
from cache_service.keys import PageKey
from cache_service.messages import (
    PROTOCOL_VERSION,
    Done,
    Leased,
    LeasedPage,
    LeasePages,
    Refused,
    ReleasePages,
)
from cache_service.wire import Wire

logger = logging.getLogger(__name__)

KEEPALIVE_S = 1.0
"""Between two messages to a reader that holds leases; one that cannot be sent shows that it has gone."""
_MAX_FENCED = 4_096
_LENT_SHARE = 4
"""Of the arena's slots, peers hold one in so many at most."""


@dataclass(frozen=True)
class _Lease:
    """Pages that one reader holds."""

    identity: bytes
    """Of its connection."""
    reader: tuple[str, int]
    """Its node and its incarnation."""
    slots: list[int]
    since_s: float


class RemoteLeases:
    """`keep_alive` writes to a connection and tells whether it is still there."""

    def __init__(
        self, wire: Wire | None, counts: Counter[tuple[str, str]], keep_alive: Callable[[bytes], bool]
    ) -> None:
        self._wire = wire
        self._counts = counts
        self._keep_alive = keep_alive
        self._access: ArenaAccess | None = None
        self._leases: dict[int, _Lease] = {}
        self._lease_ids = itertools.count(1)
        self._fenced: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._num_slots = 0
        self._next_keepalive_s = 0.0
        self.oldest_s = 0.0
        """The age of the oldest lease at the last `tick`; 0 without any."""

    @property
    def num_slots(self) -> int:
        """Pages lent, each counted once a lease."""
        return self._num_slots

    def begin(self, access: ArenaAccess) -> None:
        """See ArenaUser."""
        self._access = access

    def end(self) -> bool:
        """See ArenaUser. Readers find their leases ended, and the wire was closed before."""
        for lease_id in list(self._leases):
            self._end(lease_id)
        self._access = None
        return True

    def lease(self, identity: bytes, request: LeasePages, now_s: float) -> Leased | Refused:
        """Lease the longest prefix of pages that is here."""
        reader = (request.reader, request.incarnation)
        if request.protocol_version != PROTOCOL_VERSION:
            return Refused(
                "protocol_version",
                f"node {request.reader} speaks protocol {request.protocol_version}, this one"
                f" {PROTOCOL_VERSION}; run the same release of eyrie on both",
            )
        if self._wire is None:
            return Refused("no_transfer", "this node lends no pages to peers; start it with a transfer")
        access, transfer = self._access, self._wire.transfer
        if access is None:  # nobody has attached: there is no page yet
            return Leased(0, "", [])
        wanted = (request.fingerprint, request.bundle_bytes, request.num_ranks)
        layout = access.layout
        if wanted != (layout.fingerprint, layout.bundle_bytes, layout.num_ranks):
            return Refused(
                "layout", f"node {request.reader} wants pages of another model or layout than this node has"
            )
        if transfer is None:
            return Refused("no_transfer", "this node's arena is not registered with its transfer")
        if access.arena.safety.fencing and reader in self._fenced:
            return Refused(
                "fenced",
                f"incarnation {request.incarnation} of node {request.reader} lost its connection",
            )
        room = access.arena.spec.num_slots // _LENT_SHARE - self._num_slots
        if room <= 0:
            return Refused("busy", f"peers read one in {_LENT_SHARE} of this node's slots; ask again")
        return self._lease(identity, reader, request.keys[:room], access, now_s)

    def release(self, identity: bytes, request: ReleasePages) -> Done:
        """Take leases back; say how many this connection held."""
        held = [
            lease_id
            for lease_id in request.lease_ids
            if lease_id in self._leases and self._leases[lease_id].identity == identity
        ]
        for lease_id in held:
            self._end(lease_id)
        return Done(len(held))

    def lost(self, identity: bytes) -> None:
        """End the leases of a connection that is closed."""
        for lease_id, lease in list(self._leases.items()):
            if lease.identity == identity:
                self._fenced[lease.reader] = None
                while len(self._fenced) > _MAX_FENCED:
                    self._fenced.popitem(last=False)
                self._end(lease_id)
                self._counts["remote_leases", "fenced"] += 1
                logger.warning(
                    "a peer left with pages leased",
                    extra={
                        "peer": lease.reader[0],
                        "incarnation": lease.reader[1],
                        "pages": len(lease.slots),
                    },
                )

    def tick(self, now_s: float) -> None:
        """Look whether readers are still there."""
        since_s = next((lease.since_s for lease in self._leases.values()), now_s)  # in the order granted
        self.oldest_s = now_s - since_s
        if not self._leases or now_s < self._next_keepalive_s:
            return
        self._next_keepalive_s = now_s + KEEPALIVE_S
        for identity in {lease.identity for lease in self._leases.values()}:
            if not self._keep_alive(identity):
                self.lost(identity)

    def _lease(
        self,
        identity: bytes,
        reader: tuple[str, int],
        keys: Sequence[PageKey],
        access: ArenaAccess,
        now_s: float,
    ) -> Leased:
        assert self._wire is not None and self._wire.transfer is not None
        arena, segment = access.arena, self._wire.transfer.segment
        locations = []
        for location in access.store.lookup(keys):
            if location is None:
                break
            locations.append(location)
        if arena.safety.remote_leases:
            del locations[access.leases.acquire(keys[: len(locations)], locations) :]
        if not locations:
            return Leased(0, segment, [])
        slots = [location.slot for location in locations]
        lease_id = next(self._lease_ids)
        self._leases[lease_id] = _Lease(identity, reader, slots, now_s)
        self._num_slots += len(slots)
        self._counts["remote_leases", "granted"] += 1
        access.store.touch(keys[: len(slots)])
        pages = [
            LeasedPage(
                location.slot,
                location.epoch,
                self._wire.address + location.slot * arena.spec.slot_bytes,
                [arena.checksum(location.slot, rank) for rank in range(arena.spec.num_ranks)],
            )
            for location in locations
        ]
        return Leased(lease_id, segment, pages)

    def _end(self, lease_id: int) -> None:
        lease = self._leases.pop(lease_id)
        self._num_slots -= len(lease.slots)
        assert self._access is not None
        if self._access.arena.safety.remote_leases:
            self._access.leases.release(lease.slots)
