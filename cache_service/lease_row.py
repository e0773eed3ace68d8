"""LeaseRow: a reader's side of the lease protocol (I7), in each worker and in the server for fetches.

reader:  lease byte = 1;   full fence;  state, epoch and key as expected?  else lease byte = 0, a miss
evictor: state = EVICTING; full fence;  any lease byte?  then READY again
"""

import threading
from collections.abc import Iterable, Sequence

from cache_service.arena import Arena
from cache_service.keys import PageKey
from cache_service.page_records import Location


class LeaseRow:
    """One row of lease bytes, of which this process is the one writer. Leases count within the process.

    Any thread may lease and release.
    """

    def __init__(self, arena: Arena, row: int) -> None:
        self._arena = arena
        self._leases = arena.lease_bytes(row)
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def num_leased(self) -> int:
        """Slots that this process holds."""
        return len(self._counts)

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        """Lease the longest readable prefix of pages; return its length. The rest is a miss.

        The caller releases that many slots once the last copy from them is complete, cancelled or not.
        """
        for place, (key, location) in enumerate(zip(keys, locations, strict=True)):
            if not self.acquire_one(key, location):
                return place
        return len(locations)

    def acquire_one(self, key: PageKey, location: Location) -> bool:
        """Lease a page, to be released like those of `acquire`; False: a miss."""
        arena, slot = self._arena, location.slot
        with self._lock:
            count = self._counts.get(slot, 0)
            self._counts[slot] = count + 1
            if not count:
                self._leases[slot] = 1
            arena.fence()
            if arena.safety.epochs and not arena.is_readable(slot, location.epoch, key):
                self._let_go(slot)
                return False
            # What the caller reads of the bytes comes after what was read of the headers.
            arena.fence()
            return True

    def acquire_all(self, entries: Sequence[tuple[int, int, PageKey]]) -> list[bool]:
        """Lease what is readable of many pages, each (slot, epoch, key); tell of each."""
        arena, counts, leases = self._arena, self._counts, self._leases
        with self._lock:
            for slot, _, _ in entries:
                count = counts.get(slot, 0)
                counts[slot] = count + 1
                if not count:
                    leases[slot] = 1
            arena.fence()
            are_leased = arena.are_readable(entries) if arena.safety.epochs else [True] * len(entries)
            for (slot, _, _), is_leased in zip(entries, are_leased, strict=True):
                if not is_leased:
                    self._let_go(slot)
            arena.fence()  # as in acquire_one
            return are_leased

    def release(self, slots: Iterable[int]) -> None:
        """Give back one lease of each slot."""
        with self._lock:
            self._arena.fence()  # the copies' reads come before the leases' end
            for slot in slots:
                self._let_go(slot)

    def are_current(self, slots: Sequence[int], epochs: Sequence[int]) -> list[bool]:
        """Tell of each of many slots what `is_current` does."""
        self._arena.fence()
        if not self._arena.safety.epochs:
            return [True] * len(slots)
        return [found == epoch for found, epoch in zip(self._arena.epochs(slots), epochs, strict=True)]

    def is_current(self, location: Location) -> bool:
        """Tell whether a leased slot still holds what was acquired: asked once a copy is complete.

        False is a bug. A page dropped meanwhile keeps its slot until its last lease goes.
        """
        self._arena.fence()
        return not self._arena.safety.epochs or self._arena.epoch(location.slot) == location.epoch

    def _let_go(self, slot: int) -> None:
        count = self._counts[slot] - 1
        if count:
            self._counts[slot] = count
        else:
            del self._counts[slot]
            self._leases[slot] = 0
