"""A node's arena and a group's moves as HostTier sees them: tests decide what comes of each move."""

from cache_service.keys import NamespaceDigest, page_keys
from cache_service.page_records import Grant, Location
from workers.kvcache.manager import KVCacheManager
from workers.move_board import MoveStatus
from workers.plan import LoadPages, OpenSlot, SavePages
from workers.protocol import SamplingParams

NAMESPACE = NamespaceDigest(b"n" * 16)
PAGE_SIZE = 4


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

    def grant(self, slot):
        """A slot more may be written."""
        self.free.append(slot)
        self.epochs += [0] * (slot + 1 - len(self.epochs))

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
        self.ends_as = None
        """What a move comes to right after somebody has looked at it, as threads may have it."""

    def status(self, move):
        found = self.at.get(move, MoveStatus.PENDING)
        if self.ends_as is not None:
            self.at.setdefault(move, self.ends_as)
        return found

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


class Bench:
    """A manager with a tier; ops of a step are taken by `ops`."""

    def __init__(self, num_pages=16, policy="write_through", num_slots=64, capacity=64):
        self.host = FakeHost(num_slots)
        self.moves = FakeMoves(capacity)
        self.cache = KVCacheManager(num_pages, PAGE_SIZE, NAMESPACE, incarnation=3)
        self.tier = self.cache.attach_tier(self.host, self.moves, policy)
        self.num_steps = 0
        self.log = []

    def ops(self):
        self.cache.check()
        taken = self.cache.take_ops()
        self.log += taken
        return taken

    def open(self, slot, token_ids, salt=b""):
        op = OpenSlot(slot, SamplingParams(), 0, len(token_ids), list(token_ids))
        return self.cache.open(op, self.cache.keyed(token_ids, salt))

    def run(self, slot, token_ids, salt=b""):
        """Open, compute and close a request; return how many tokens it found."""
        num_cached = self.open(slot, token_ids, salt)
        assert self.cache.is_readable(slot)
        assert self.cache.reserve(slot, len(token_ids))
        self.num_steps += 1
        self.cache.planned(self.num_steps)
        self.cache.commit(slot, len(token_ids))
        self.cache.completed(self.num_steps)
        self.cache.close(slot)
        return num_cached

    def saves(self):
        return moves_of(self.log, SavePages)

    def loads(self):
        return moves_of(self.log, LoadPages)

    def finish(self, status=MoveStatus.DONE):
        """All moves in the log come to this, unless told otherwise before."""
        self.ops()
        for move, *_ in self.saves() + self.loads():
            self.moves.at.setdefault(move, status)
        slots = self.cache.settle()
        for slot in slots:
            self.cache.close(slot)
        self.cache.drop_failed()
        self.cache.check()
        return slots

    def forget_device(self):
        """Evict every cached page from the device."""
        num_pages = self.cache.num_pages
        self.open(99, [7])
        assert self.cache.reserve(99, num_pages * PAGE_SIZE)
        self.cache.close(99)
        assert self.cache.stats().num_cached_pages == 0
        self.ops()


def tokens(num_tokens, first=0):
    return list(range(first, first + num_tokens))


KEYS = page_keys(NAMESPACE, tokens(12), PAGE_SIZE)
