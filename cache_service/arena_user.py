"""What the CacheServer's own moves (FETCH, PUT, lending to peers) have of the arena, and for how long."""

from dataclasses import dataclass
from typing import Protocol

from cache_service.arena import Arena
from cache_service.lease_row import LeaseRow
from cache_service.page_store import PageStore
from cache_service.remote import RecordLayout


@dataclass(frozen=True)
class ArenaAccess:
    """The server's own place in one arena. `store` is for the server's thread alone."""

    arena: Arena
    store: PageStore
    group: int
    """The slots granted to it are the server's to write."""
    leases: LeaseRow
    """Shared by all that the server reads; any thread may lease."""

    @property
    def layout(self) -> RecordLayout:
        """What a page must be made of to be of use here."""
        spec = self.arena.spec
        return RecordLayout(spec.fingerprint, spec.bundle_bytes, spec.num_ranks)


class ArenaUser(Protocol):
    """Works on the arena beside the calls. Both methods are called in the server's thread."""

    def begin(self, access: ArenaAccess) -> None:
        """There is an arena from now on."""

    def end(self) -> bool:
        """Give up all that is under way, soon: the arena goes. Tell whether nothing touches it any more.

        What still may touch it holds views of its memory, which keep it mapped.
        """
        ...
