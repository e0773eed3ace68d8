"""A node's arena and a group's moves as HostTier sees them: tests decide what comes of each move."""

from cache_service.page_records import Grant, Location
from workers.move_board import MoveStatus


class FakeHost:
    """HostCache over a dict; a grant is a number, an eviction is `evict`."""

    def __init__(self, num_slots=64):
        self.free = list(range(num_slots))
        self.epochs = [0] * num_slots
        self.stored = {}
        self.parents = {}
        self.leases = []
        self.lost = []
        self.corrupt = []
        self.touched = []
        self.is_blind = False

    def locate(self, key):
        return None if self.is_blind else self.stored.get(key)

    def acquire(self, keys, locations):
        num = 0
        while num < len(keys) and self.stored.get(keys[num]) == locations[num]:
            num += 1
        self.leases += [location.slot for location in locations[:num]]
        return num

    def release(self, slots):
        for slot in slots:
            self.leases.remove(slot)

    def take_grant(self):
        if not self.free:
            return None
        slot = self.free.pop()
        self.epochs[slot] += 1
        return Grant(slot, self.epochs[slot])

    def commit(self, entries):
        for entry in entries:
            assert entry.parent is None or entry.parent in self.stored, (
                "a page is committed before its parent"
            )
            self.epochs[entry.slot] += 1
            self.stored[entry.key] = Location(entry.slot, self.epochs[entry.slot])
            self.parents[entry.key] = entry.parent

    def abort(self, grants):
        self.free += [grant.slot for grant in grants]

    def touch(self, keys):
        self.touched.append(list(keys))

    def report_corrupt(self, location):
        self.corrupt.append(location)
        for key in [key for key, where in self.stored.items() if where == location]:
            del self.stored[key]
            self.lost.append(key)

    def take_lost(self):
        lost, self.lost = self.lost, []
        return lost

    def evict(self, key):
        slot = self.stored.pop(key).slot
        assert slot not in self.leases
        self.free.append(slot)
        self.lost.append(key)


class FakeMoves:
    """MoveStatuses by number; `at` says what a move has come to, on one rank of a group of one."""

    def __init__(self, capacity=64):
        self.capacity = capacity
        self.at = {}
        self.still_busy = set()

    def status(self, move):
        return self.at.get(move, MoveStatus.PENDING)

    def is_over(self, move):
        return self.status(move).is_over and move not in self.still_busy


def moves_of(ops, kind):
    """The moves of all ops of one kind: (number, page, slot, epoch, key)."""
    return [
        (op.first_move + index, *one)
        for op in ops
        if isinstance(op, kind)
        for index, one in enumerate(zip(op.pages, op.slots, op.epochs, op.keys, strict=True))
    ]
