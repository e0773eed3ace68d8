"""What a PageStore and those who use it tell each other: grants, entries, results, locations.

They cross process boundaries inside messages.
"""

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from cache_service.keys import KEY_BYTES, PageKey

_Key = Annotated[PageKey, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Slot = Annotated[int, Meta(ge=0)]


class Grant(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A slot to be written; `epoch` is odd and belongs to this grant alone."""

    slot: _Slot
    epoch: int


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A granted slot that now holds a page. `parent` is None for a first page, `length` counts tokens.

    `tenant` is the number that the page is charged to.
    """

    slot: _Slot
    epoch: int
    key: _Key
    parent: _Key | None
    length: Annotated[int, Meta(ge=0, lt=1 << 32)]
    tenant: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0


class Location(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a page can be read: in `slot`, while the slot's epoch is `epoch`."""

    slot: _Slot
    epoch: int


class CommitStatus(IntEnum):
    """What became of an entry. Only with `STALE` is the slot left as it was; else the grant has ended."""

    COMMITTED = 0
    DUPLICATE = 1
    """The key was there already: the first writer wins, the slot is free again."""
    STALE = 2
    """The slot is not granted to this group under this epoch."""
    NO_PARENT = 3
    """The page that this one continues is not in the store; the slot is free again."""
    INCOMPLETE = 4
    """A rank has not written its checksum; the slot is free again."""
    OVER_QUOTA = 5
    """The tenant has its share and none of its pages could go; the slot is free again."""


class CommitResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to one entry; `location` is where its key can be read now, if it can."""

    status: CommitStatus
    location: Location | None
