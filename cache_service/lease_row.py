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
        arena, counts, leases = self._arena, self._counts, self._leases
        with self._lock:
            for location in locations:
                slot = location.slot
                count = counts.get(slot, 0)
                counts[slot] = count + 1
                if not count:
                    leases[slot] = 1
            arena.fence()
            num_held = len(locations)
            if arena.safety.epochs:
                is_readable = arena.is_readable
                for place, (key, location) in enumerate(zip(keys, locations, strict=True)):
                    if not is_readable(location.slot, location.epoch, key):
                        num_held = place
                        break
            for location in locations[num_held:]:
                self._let_go(location.slot)
            # What the caller reads of the bytes comes after what was read of the headers.
            arena.fence()
        return num_held

    def release(self, slots: Iterable[int]) -> None:
        """Give back one lease of each slot."""
        with self._lock:
            self._arena.fence()  # the copies' reads come before the leases' end
            for slot in slots:
                self._let_go(slot)

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
