"""What the bookkeeping half asks of a node's host cache and of a group's moves: Protocols, for fakes too.

cache_service.client.CacheClient is both HostCache and RemotePages, workers.move_board.MoveBoard is
MoveStatuses. No call blocks; whatever fails is a miss.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from cache_service.fetch_calls import FetchAnswer
from cache_service.keys import PageKey
from cache_service.messages import WantedPage
from cache_service.page_records import Entry, Grant, Location
from workers.move_board import MoveStatus


class HostCache(Protocol):
    """What the HostTier needs of the arena of its node."""

    def locate(self, key: PageKey) -> Location | None:
        """Return where the page is, as far as is known; a lease proves or disproves it."""
        ...

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        """Lease the longest readable prefix; return its length."""
        ...

    def release(self, slots: Iterable[int]) -> None:
        """Give back one lease of each slot."""

    def take_grant(self) -> Grant | None:
        """Return a slot to write, held in advance; None: there is none now."""
        ...

    def commit(self, entries: Sequence[Entry]) -> None:
        """Make written slots readable, parents before children."""

    def abort(self, grants: Sequence[Grant]) -> None:
        """Give grants back that hold nothing."""

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Count a use of pages, given with all that they continue."""

    def report_corrupt(self, location: Location) -> None:
        """Have a page dropped whose bytes do not match its checksum."""

    def take_lost(self) -> list[PageKey]:
        """Return the pages that left the arena, or were not taken in, since the last call."""
        ...


class MoveStatuses(Protocol):
    """What the HostTier needs to know of the moves it has logged."""

    @property
    def capacity(self) -> int:
        """Moves that may be in flight."""
        ...

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on the group."""
        ...

    def is_over(self, move: int) -> bool:
        """Tell whether no rank will touch the move's page or slot again."""
        ...


class RemotePages(Protocol):
    """What the Prefetcher needs: pages of peers and of the remote store, brought into the node's arena."""

    def is_remote(self, key: PageKey) -> bool:
        """Tell whether the remote store has the page, as far as has been heard."""
        ...

    def fetch(self, pages: Sequence[WantedPage], peer: str | None, timeout_s: float) -> int:
        """Have pages brought here, parents before children; return the FETCH's number."""
        ...

    def take_fetched(self) -> list[FetchAnswer]:
        """Return what has come of FETCHes since the last call."""
        ...
