"""PageReplica: where a node's pages are, as its CacheServer has told so far, and which of them were lost.

Fed by a Subscriber's thread; read by the thread that wants pages.
"""

import threading
from collections.abc import Iterable, Sequence

from cache_service.keys import PageKey
from cache_service.page_records import Location
from cache_service.relocation_records import (
    Change,
    Removed,
    RemovedRemotely,
    Standing,
    Stored,
    StoredRemotely,
)


class PageReplica:
    """A RelocationListener. It may be behind at any time: a lease proves or disproves what it says."""

    def __init__(self) -> None:
        self._locations: dict[PageKey, Location] = {}
        self._remote: set[PageKey] = set()
        self._lost: dict[PageKey, None] = {}
        self._lock = threading.Lock()  # of `_lost`

    def __len__(self) -> int:
        return len(self._locations)

    def get(self, key: PageKey) -> Location | None:
        """Return where the page is, as far as has been heard."""
        return self._locations.get(key)

    def is_remote(self, key: PageKey) -> bool:
        """Tell whether the remote store has the page, as far as has been heard."""
        return key in self._remote

    def lose(self, keys: Iterable[PageKey]) -> None:
        """Note pages that did not get in. Any thread may call it."""
        with self._lock:
            self._lost.update(dict.fromkeys(keys))

    def take_lost(self) -> list[PageKey]:
        """Return the pages that went, or did not get in, since the last call; each once, in order."""
        if not self._lost:  # called every step
            return []
        with self._lock:
            lost, self._lost = self._lost, {}
        return list(lost)

    def restart(self, stored: Sequence[Standing]) -> None:
        """See RelocationListener."""
        before = self._locations
        self._locations = {
            entry.key: Location(entry.slot, entry.epoch) for entry in stored if isinstance(entry, Stored)
        }
        self._remote = {entry.key for entry in stored if isinstance(entry, StoredRemotely)}
        self.lose([key for key in before if key not in self._locations])

    def apply(self, changes: Sequence[Change]) -> None:
        """See RelocationListener."""
        with self._lock:
            for change in changes:
                if isinstance(change, Stored):
                    self._locations[change.key] = Location(change.slot, change.epoch)
                    self._lost.pop(change.key, None)
                elif isinstance(change, Removed):
                    self._locations.pop(change.key, None)
                    self._lost[change.key] = None
                elif isinstance(change, StoredRemotely):
                    self._remote.add(change.key)
                elif isinstance(change, RemovedRemotely):
                    self._remote.discard(change.key)
                else:
                    self._remote.clear()
