"""The changes a relocation log consists of: where a page starts or stops being valid in one node's arena, and
in the remote store behind it.

Written by the PageStore, numbered by the RelocationLog, applied by every subscriber.
"""

from typing import Protocol

import msgspec

from cache_service.keys import PageKey


class Stored(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The page `key` can be read in `slot` while the slot's epoch is `epoch`.

    `parent` is None for a first page.
    """

    key: PageKey
    parent: PageKey | None
    slot: int
    epoch: int


class Removed(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The page `key` is no longer in `slot` under `epoch`: evicted, dropped or cleared."""

    key: PageKey
    slot: int
    epoch: int


class StoredRemotely(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The page `key` was put into the remote store, or found there. It may go from there unheard."""

    key: PageKey


class RemovedRemotely(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """The page `key` was looked for in the remote store in vain, or is remembered no more."""

    key: PageKey


class AllRemovedRemotely(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The remote store was detached: whatever was told of it is void."""


Change = Stored | Removed | StoredRemotely | RemovedRemotely | AllRemovedRemotely
Standing = Stored | StoredRemotely
"""What holds at one version. A page may be in both places."""


class ChangeSink(Protocol):
    """Takes each change at the moment it is made; the RelocationLog, or a list in tests."""

    def append(self, change: Change, /) -> object:
        """Take one change."""
