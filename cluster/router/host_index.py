"""HostIndex: which PageKeys the nodes' arenas and the remote store have, as far as this API process knows.

Each node's pages have one writer, the thread of its CacheFeed; they are read on the event loop. They may be
behind at any time: the worker is right, a stale index costs a miss.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cache_service.config import CacheConfig
from cache_service.keys import PageKey
from cache_service.relocation_records import (
    Change,
    Removed,
    RemovedRemotely,
    Standing,
    Stored,
    StoredRemotely,
)
from cache_service.store_address import DiskAddress, parse_store_address
from cluster.router.ways import Residence
from workers.protocol import FetchHint, ReplicaId


@dataclass(frozen=True)
class CacheAddress:
    """Where one node's CacheServer is."""

    node: str
    """Its address, as metrics name it."""
    calls: str
    """Endpoint for calls, its name in hints too."""
    broadcasts: str
    """Endpoint of its relocations."""


@dataclass(frozen=True)
class FetchScope:
    """From where the nodes can fetch."""

    reads_peers: bool = True
    """They read pages out of each other's arenas."""
    is_store_shared: bool = True
    """What one node put into the remote store, all can have; else each has its own."""

    @staticmethod
    def of(config: CacheConfig) -> "FetchScope":
        """Return what a configuration allows."""
        return FetchScope(config.transfer != "off", config.store is None or _is_shared(config.store))


class NodePages:
    """A RelocationListener that keeps keys only: where in the arena a page is does not matter here."""

    def __init__(self) -> None:
        self._in_arena: set[PageKey] = set()
        self._remote: set[PageKey] = set()

    @property
    def num_in_arena(self) -> int:
        """Pages of the node's arena."""
        return len(self._in_arena)

    @property
    def num_remote(self) -> int:
        """Pages that the node knows in the remote store."""
        return len(self._remote)

    def num_leading(self, keys: Sequence[PageKey]) -> int:
        """Return how many leading pages the arena has: it has none without its parent."""
        in_arena = self._in_arena
        return bisect_left(range(len(keys)), True, key=lambda place: keys[place] not in in_arena)

    def is_remote(self, key: PageKey) -> bool:
        """Tell whether the remote store has the page."""
        return key in self._remote

    def restart(self, stored: Sequence[Standing]) -> None:
        """See RelocationListener."""
        self._in_arena = {entry.key for entry in stored if isinstance(entry, Stored)}
        self._remote = {entry.key for entry in stored if isinstance(entry, StoredRemotely)}

    def apply(self, changes: Sequence[Change]) -> None:
        """See RelocationListener."""
        for change in changes:
            if isinstance(change, Stored):
                self._in_arena.add(change.key)
            elif isinstance(change, Removed):
                self._in_arena.discard(change.key)
            elif isinstance(change, StoredRemotely):
                self._remote.add(change.key)
            elif isinstance(change, RemovedRemotely):
                self._remote.discard(change.key)
            else:
                self._remote.clear()


class KnownNode(Protocol):
    """What the index needs of cluster.router.cache_feed.CacheFeed."""

    @property
    def address(self) -> CacheAddress:
        """Where the node's CacheServer is."""
        ...

    @property
    def pages(self) -> NodePages:
        """What it told."""
        ...

    def is_heard(self, now_s: float) -> bool:
        """Tell whether the CacheServer speaks, and is the one that told what is known; else that is void."""
        ...


class HostIndex:
    """`nodes` says which CacheServer a replica's node has; replicas of one node have the same object."""

    def __init__(self, nodes: Mapping[ReplicaId, KnownNode], scope: FetchScope) -> None:
        self._nodes = nodes
        self._all = list(dict.fromkeys(nodes.values()))
        self._scope = scope

    def use_store(self, store: str) -> None:
        """Note that the nodes have this store from now on, whatever they had before."""
        self._scope = replace(self._scope, is_store_shared=_is_shared(store))

    def residence(
        self, replica_id: ReplicaId, keys: Sequence[PageKey], num_on_device: int, now_s: float
    ) -> Residence:
        """Return where the leading pages of a prompt are, seen from a replica that holds so many."""
        own = self._nodes.get(replica_id)
        heard = [node for node in self._all if node.is_heard(now_s)]
        if own is None or own not in heard:  # what is fetched comes through the node's own CacheServer
            return Residence(num_on_device)
        num_in_arena = own.pages.num_leading(keys)
        num_on_node = max(num_on_device, num_in_arena)
        elsewhere = [
            FetchHint(node.address.calls, node.pages.num_leading(keys))
            for node in heard
            if node is not own and self._scope.reads_peers
        ]
        stores = heard if self._scope.is_store_shared else [own]
        elsewhere.append(FetchHint(None, _num_with_remote(stores, keys, num_in_arena)))
        return Residence(
            num_on_device, num_in_arena, [hint for hint in elsewhere if hint.num_pages > num_on_node]
        )


def _is_shared(store: str) -> bool:
    return not isinstance(parse_store_address(store), DiskAddress)


def _num_with_remote(nodes: Sequence[KnownNode], keys: Sequence[PageKey], num_in_arena: int) -> int:
    """Return how many leading pages arena and store have together, by what these nodes know of the store."""
    for place in range(num_in_arena, len(keys)):
        if not any(node.pages.is_remote(keys[place]) for node in nodes):
            return place
    return len(keys)
