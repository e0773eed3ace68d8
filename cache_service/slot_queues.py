"""SlotQueues: queues over slots in three arrays, every operation O(1) and without allocation."""

from array import array

_NONE = -1


class SlotQueues:
    """Any number of queues by number; a slot is in at most one of them."""

    def __init__(self, num_slots: int) -> None:
        self._next = array("i", [_NONE]) * num_slots
        self._previous = array("i", [_NONE]) * num_slots
        self._queue_of = array("i", [_NONE]) * num_slots
        self._fronts: dict[int, int] = {}
        self._backs: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    @property
    def num_queues(self) -> int:
        """Queues that hold a slot."""
        return len(self._counts)

    def count(self, queue: int) -> int:
        """Return how many slots a queue holds."""
        return self._counts.get(queue, 0)

    def queue_of(self, slot: int) -> int | None:
        """Return the queue that a slot is in."""
        queue = self._queue_of[slot]
        return None if queue == _NONE else queue

    def front(self, queue: int) -> int | None:
        """Return the slot that has waited longest."""
        return self._fronts.get(queue)

    def push(self, queue: int, slot: int) -> None:
        """Put a slot at the back; it must be in no queue."""
        assert self._queue_of[slot] == _NONE, f"slot {slot} is in queue {self._queue_of[slot]} already"
        back = self._backs.get(queue, _NONE)
        self._queue_of[slot] = queue
        self._previous[slot] = back
        self._next[slot] = _NONE
        if back == _NONE:
            self._fronts[queue] = slot
        else:
            self._next[back] = slot
        self._backs[queue] = slot
        self._counts[queue] = self._counts.get(queue, 0) + 1

    def remove(self, slot: int) -> None:
        """Take a slot out of its queue."""
        queue, before, after = self._queue_of[slot], self._previous[slot], self._next[slot]
        assert queue != _NONE, f"slot {slot} is in no queue"
        self._queue_of[slot] = _NONE
        self._counts[queue] -= 1
        if self._counts[queue] == 0:
            del self._counts[queue], self._fronts[queue], self._backs[queue]
            return
        if before == _NONE:
            self._fronts[queue] = after
        else:
            self._next[before] = after
        if after == _NONE:
            self._backs[queue] = before
        else:
            self._previous[after] = before

    def move(self, slot: int, queue: int) -> None:
        """Take a slot out of its queue and put it at the back of `queue`."""
        self.remove(slot)
        self.push(queue, slot)

    def slots(self, queue: int) -> list[int]:
        """Return a queue's slots from the front; for checks."""
        found = []
        slot = self._fronts.get(queue, _NONE)
        while slot != _NONE:
            found.append(slot)
            slot = self._next[slot]
        return found
