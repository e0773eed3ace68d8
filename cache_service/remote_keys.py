"""RemoteKeys: the pages that the remote store has, as far as this node's puts and gets have shown.

Part of an attached store; used by the CacheServer's thread. Every change of it is told to the relocation log.
"""

from collections import OrderedDict
from collections.abc import Iterator

from cache_service.keys import PageKey
from cache_service.relocation_records import AllRemovedRemotely, ChangeSink, RemovedRemotely, StoredRemotely


class RemoteKeys:
    """At most `max_keys` of them: beyond that the longest known are forgotten, and told as removed."""

    def __init__(self, max_keys: int, changes: ChangeSink) -> None:
        self._max_keys = max_keys
        self._changes = changes
        self._keys: OrderedDict[PageKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[PageKey]:
        return iter(self._keys)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._keys

    def add(self, key: PageKey) -> None:
        """Note that the store has a page, or has it still."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return
        if len(self._keys) >= self._max_keys:
            oldest, _ = self._keys.popitem(last=False)
            self._changes.append(RemovedRemotely(oldest))
        self._keys[key] = None
        self._changes.append(StoredRemotely(key))

    def lose(self, key: PageKey) -> None:
        """Note that the store was asked for a page in vain; told even of one that was not known.

        A listener may have believed it on another node's word, whose store is the same.
        """
        self._keys.pop(key, None)
        self._changes.append(RemovedRemotely(key))

    def lose_all(self) -> int:
        """Forget every page: the store is detached. Return how many there were."""
        num_keys = len(self._keys)
        if num_keys:
            self._changes.append(AllRemovedRemotely())
        self._keys.clear()
        return num_keys
