"""PutQueue: pages on their way to the remote store (PUT): those that wait, and those that are being put.

Part of an attached store; used by the CacheServer's thread. Parents go before children. A page that cannot go
is a counted loss; it is tried again with the next page that continues it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_service.arena_format import bundle_checksum
from cache_service.arena_user import ArenaAccess
from cache_service.keys import PageKey
from cache_service.page_records import Location
from cache_service.remote import MAX_DESCRIPTORS, PageRecord, PutStatus
from cache_service.remote_keys import RemoteKeys

CORRUPT = "corrupt"
"""Why a page is dropped whose bytes are not what its slot's header vouches for."""


@dataclass(frozen=True)
class PutLimits:
    """How much waits, and how much is put, and leased, at once; at least one page."""

    max_pages: int = 4_096
    max_bytes: int = 1 << 30
    max_batch_pages: int = MAX_DESCRIPTORS // 2
    """Each is a header and its bytes to a store."""
    max_batch_bytes: int = 64 << 20


@dataclass(frozen=True)
class PutPage:
    """A page that is being put: leased until its batch is quiet."""

    record: PageRecord
    location: Location
    parent: PageKey | None

    def is_intact(self) -> bool:
        """Tell whether the bytes are those that the slot's header vouches for. In any thread."""
        record = self.record
        size = record.data.nbytes // len(record.checksums)
        return all(
            bundle_checksum(record.data[rank * size : (rank + 1) * size], record.key, rank) == checksum
            for rank, checksum in enumerate(record.checksums)
        )


class PutQueue:
    """`keys` are what the store has; `counts` are the server's counters by (name, reason)."""

    def __init__(
        self,
        access: ArenaAccess,
        keys: RemoteKeys,
        counts: Counter[tuple[str, str]],
        limits: PutLimits,
    ) -> None:
        slot_bytes = access.arena.spec.slot_bytes
        self._access = access
        self._keys = keys
        self._counts = counts
        self._max_pages = max(1, min(limits.max_pages, limits.max_bytes // slot_bytes))
        self._max_batch = max(1, min(limits.max_batch_pages, limits.max_batch_bytes // slot_bytes))
        self._waiting: deque[PageKey] = deque()
        self._queued: set[PageKey] = set()
        """Those that wait, and those that are being put."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_half_empty(self) -> bool:
        """There is room for pages that nobody is in a hurry with."""
        return len(self._waiting) <= self._max_pages // 2

    def offer(self, keys: Iterable[PageKey]) -> None:
        """Take pages of this node, with what they continue, unless the store has them."""
        for key in keys:
            room = self._max_pages - len(self._waiting)
            if key in self._queued or key in self._keys:
                continue
            missing = self._missing(key) if room > 0 else [key]
            self._waiting.extend(missing[:room])
            self._queued.update(missing[:room])
            if len(missing) > room:  # its parents took the room, if there was any
                self._counts["puts", "queue_full"] += 1

    def has_page(self) -> bool:
        """Tell whether there is a page to put; those that have left the arena meanwhile are lost."""
        while self._waiting:
            (location,) = self._access.store.lookup([self._waiting[0]])
            if location is not None:
                return True
            self._lose()
        return False

    def take(self) -> list[PutPage]:
        """Lease and return the next batch."""
        pages: list[PutPage] = []
        while len(pages) < self._max_batch and self.has_page():
            page = self._lease(self._waiting[0])
            if page is None:
                self._lose()
            else:
                pages.append(page)
                self._waiting.popleft()
        return pages

    def ended(self, pages: Sequence[PutPage], statuses: Sequence[PutStatus | None]) -> None:
        """Note what became of a batch; None: the page was corrupt, and was not put."""
        for page, status in zip(pages, statuses, strict=True):
            key = page.record.key
            self._queued.discard(key)
            if status is None:
                self._counts["puts", CORRUPT] += 1
                self._access.store.drop(page.location, CORRUPT)
            elif not self._access.leases.is_current(page.location):  # a bug: it was leased
                self._counts["puts", "stale"] += 1
            else:
                self._counts["puts", status.value] += 1
                is_whole = page.parent is None or page.parent in self._keys
                if status in (PutStatus.STORED, PutStatus.PRESENT) and is_whole:
                    self._keys.add(key)

    def release(self, pages: Sequence[PutPage]) -> None:
        """Give a batch's leases back: it is quiet."""
        self._access.leases.release([page.location.slot for page in pages])

    def clear(self, reason: str) -> None:
        """Lose what waits."""
        self._counts["puts", reason] += len(self._waiting)
        self._queued.difference_update(self._waiting)
        self._waiting.clear()

    def _missing(self, key: PageKey) -> list[PageKey]:
        """Return the page, and before it those it continues, up to the first that is known to get there."""
        chain: list[PageKey] = []
        current: PageKey | None = key
        while current is not None and current not in self._queued and current not in self._keys:
            (location,) = self._access.store.lookup([current])
            if location is None:
                break
            chain.append(current)
            current = self._access.arena.parent(location.slot)
        return chain[::-1]

    def _lose(self) -> None:
        self._queued.discard(self._waiting.popleft())
        self._counts["puts", "gone"] += 1

    def _lease(self, key: PageKey) -> PutPage | None:
        arena = self._access.arena
        (location,) = self._access.store.lookup([key])
        if location is None or not self._access.leases.acquire([key], [location]):
            return None
        slot = location.slot
        checksums = tuple(arena.checksum(slot, rank) for rank in range(arena.spec.num_ranks))
        record = PageRecord(key, arena.length(slot), checksums, arena.slot_data(slot))
        return PutPage(record, location, arena.parent(slot))
