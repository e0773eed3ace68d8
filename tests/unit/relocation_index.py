"""The plainest RelocationListener: what an owner told, to be compared with what is there."""

from collections.abc import Sequence

from cache_service.keys import PageKey
from cache_service.relocation_records import (
    Change,
    Removed,
    RemovedRemotely,
    Standing,
    Stored,
    StoredRemotely,
)


class RelocationIndex:
    """A replica of one owner's index: key -> where it is. One writer, the follower's thread; any reader."""

    def __init__(self) -> None:
        self._stored: dict[PageKey, Stored] = {}
        self._remote: set[PageKey] = set()

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, key: PageKey) -> Stored | None:
        """Return where the page is, as far as has been heard; the slot's epoch proves or disproves it."""
        return self._stored.get(key)

    def is_remote(self, key: PageKey) -> bool:
        """Tell whether the remote store has the page, as far as has been heard."""
        return key in self._remote

    def entries(self) -> dict[PageKey, Stored]:
        """Return a copy; in the follower's thread, or while it is quiet."""
        return dict(self._stored)

    def restart(self, stored: Sequence[Standing]) -> None:
        """See RelocationListener."""
        self._stored = {entry.key: entry for entry in stored if isinstance(entry, Stored)}
        self._remote = {entry.key for entry in stored if isinstance(entry, StoredRemotely)}

    def apply(self, changes: Sequence[Change]) -> None:
        """See RelocationListener."""
        for change in changes:
            if isinstance(change, Stored):
                self._stored[change.key] = change
            elif isinstance(change, Removed):
                self._stored.pop(change.key, None)
            elif isinstance(change, StoredRemotely):
                self._remote.add(change.key)
            elif isinstance(change, RemovedRemotely):
                self._remote.discard(change.key)
            else:
                self._remote.clear()
