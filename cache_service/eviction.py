"""Which page goes next: S3-FIFO or LRU. The PageStore asks, then sees to leases and children."""

from array import array
from collections.abc import Collection
from typing import Literal, Protocol

from cache_service.keys import PageKey
from cache_service.slot_queues import SlotQueues

EvictionPolicy = Literal["s3fifo", "lru"]


class EvictionOrder(Protocol):
    """An order over the READY slots. A touch of a page comes with touches of all it continues."""

    def add(self, slot: int, key: PageKey) -> None:
        """A page has become READY in a slot."""

    def touch(self, slot: int) -> None:
        """A page was used."""

    def remove(self, slot: int, key: PageKey, was_evicted: bool) -> None:
        """A page is gone, evicted or for another reason."""

    def candidate(self) -> int | None:
        """Return the slot to evict next, which keeps its place; None without any."""

    def defer(self, slot: int) -> None:
        """Put a candidate off that cannot go now."""

    def check(self, ready: Collection[int]) -> None:
        """Prove that the order holds exactly the READY slots."""


def eviction_order(policy: EvictionPolicy, num_slots: int) -> EvictionOrder:
    """Return an empty order."""
    return S3Fifo(num_slots) if policy == "s3fifo" else LeastRecentlyUsed(num_slots)


class LeastRecentlyUsed:
    """The page that was used longest ago goes first."""

    _QUEUE = 0

    def __init__(self, num_slots: int) -> None:
        self._queues = SlotQueues(num_slots)

    def add(self, slot: int, key: PageKey) -> None:
        """Put a new page last."""
        self._queues.push(self._QUEUE, slot)

    def touch(self, slot: int) -> None:
        """Put a used page last."""
        self._queues.move(slot, self._QUEUE)

    def remove(self, slot: int, key: PageKey, was_evicted: bool) -> None:
        """Forget a page."""
        self._queues.remove(slot)

    def candidate(self) -> int | None:
        """Return the page used longest ago."""
        return self._queues.front(self._QUEUE)

    def defer(self, slot: int) -> None:
        """Put a page last that cannot go now: whatever holds it uses it."""
        self._queues.move(slot, self._QUEUE)

    def check(self, ready: Collection[int]) -> None:
        """Prove that the queue holds exactly the READY slots."""
        queued = self._queues.slots(self._QUEUE)
        assert len(queued) == len(ready) and set(queued) == set(ready), "LRU does not hold the READY slots"


class S3Fifo:
    """A small queue for pages used once, a main queue for the rest, and a memory of what left the small one.

    Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. One use is enough here to
    move a page to the main queue: a chat's pages are used once a turn.
    """

    _SMALL, _MAIN = 0, 1
    _SMALL_SHARE = 10
    """The small queue's aim: one part in ten of the pages."""
    _MAX_USES = 3

    def __init__(self, num_slots: int) -> None:
        self._queues = SlotQueues(num_slots)
        self._uses = array("B", [0]) * num_slots
        self._ghosts = GhostKeys(num_slots)
        self._main_is_stuck = False

    def add(self, slot: int, key: PageKey) -> None:
        """Put a new page into the small queue, one that left it lately into the main queue."""
        self._uses[slot] = 0
        self._queues.push(self._MAIN if key in self._ghosts else self._SMALL, slot)

    def touch(self, slot: int) -> None:
        """Count a use."""
        self._uses[slot] = min(self._uses[slot] + 1, self._MAX_USES)

    def remove(self, slot: int, key: PageKey, was_evicted: bool) -> None:
        """Forget a page, save for the key of one evicted from the small queue."""
        if was_evicted and self._queues.queue_of(slot) == self._SMALL:
            self._ghosts.add(key)
        self._queues.remove(slot)

    def candidate(self) -> int | None:
        """Return the next page without a use since it was last looked at; each look costs it one."""
        while True:
            num_small, num_main = self._queues.count(self._SMALL), self._queues.count(self._MAIN)
            is_due = num_small * self._SMALL_SHARE >= num_small + num_main
            from_small = is_due or num_main == 0 or (self._main_is_stuck and num_small > 0)
            slot = self._queues.front(self._SMALL if from_small else self._MAIN)
            if slot is None or self._uses[slot] == 0:
                self._main_is_stuck = False
                return slot
            self._uses[slot] = 0 if from_small else self._uses[slot] - 1
            self._queues.move(slot, self._MAIN)

    def defer(self, slot: int) -> None:
        """Put a page off that cannot go now; after one of the main queue a look at the small one is due."""
        self._main_is_stuck = self._queues.queue_of(slot) == self._MAIN
        self._queues.move(slot, self._MAIN)

    def check(self, ready: Collection[int]) -> None:
        """Prove that the two queues hold exactly the READY slots."""
        queued = self._queues.slots(self._SMALL) + self._queues.slots(self._MAIN)
        assert len(queued) == len(ready) and set(queued) == set(ready), (
            "S3-FIFO does not hold the READY slots"
        )


class GhostKeys:
    """The last `capacity` keys that were added, by 32 bits each: a table whose entries displace each other.

    A false hit puts a page into the main queue, a displaced key into the small one; neither does harm.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._mask = (1 << (2 * capacity).bit_length()) - 1
        self._prints = array("I", [0]) * (self._mask + 1)
        self._stamps = array("I", [0]) * (self._mask + 1)
        self._count = 0

    def add(self, key: PageKey) -> None:
        """Remember a key."""
        place, print_ = self._place(key)
        self._count = (self._count + 1) & 0xFFFFFFFF
        self._prints[place] = print_
        self._stamps[place] = self._count

    def __contains__(self, key: PageKey) -> bool:
        place, print_ = self._place(key)
        age = (self._count - self._stamps[place]) & 0xFFFFFFFF
        return self._prints[place] == print_ and age < self._capacity

    def _place(self, key: PageKey) -> tuple[int, int]:
        # The key is a hash already; 0 stands for an empty place.
        return int.from_bytes(key[:4], "little") & self._mask, int.from_bytes(key[4:8], "little") | 1
