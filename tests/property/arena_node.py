"""ArenaNode: one node's store, writers and readers in one process, with a check of what each may count on."""

import numpy

from cache_service.arena import Arena
from cache_service.arena_format import SlotState
from cache_service.arena_safety import ArenaSafety
from cache_service.lease_row import LeaseRow
from cache_service.page_records import CommitStatus, Entry, Location
from cache_service.page_store import PageStore, PageStoreOptions
from cache_service.pins import PinBudgetError
from cache_service.relocation_records import Stored
from tests.unit.arenas import fill, key, kill, open_arena, spec

GROUPS = (1, 2, 3)
NAMES = 14
OPTIONS = PageStoreOptions(
    min_free_ratio=0.2, target_free_ratio=0.4, tenant_ratio=0.3, pinned_ratio=0.4, eviction="s3fifo"
)


def parent_of(name):
    """Pages 0, 3 .. are first pages; the others continue the one before. The tenth is on another branch."""
    return None if name % 3 == 0 else key(0 if name == 10 else name - 1)


class ArenaNode:
    """Every action may come at any time; numbers choose among what is there."""

    def __init__(self, folder, safety=None, options=OPTIONS, num_slots=10):
        self.folder, self.safety, self.options = folder, safety or ArenaSafety(), options
        self.spec = spec(num_slots=num_slots, num_ranks=2, bundle_bytes=64)
        self.owned = open_arena(folder, self.spec, self.safety, prefault=False)
        self.owned.arena.num_usable_slots = 4
        self.arenas = [Arena.map(self.owned.arena.path, self.spec, self.safety) for _ in range(2)]
        self.readers = [LeaseRow(arena, row) for row, arena in enumerate(self.arenas)]
        self.grants = {group: [] for group in GROUPS}
        self.held = []  # reader's number, key, location
        self.heard = []  # key, location of any time
        self.statuses = set()
        self.changes = []
        self.store = PageStore(self.owned.arena, self.changes, options)

    def close(self):
        for arena in self.arenas:
            arena.close()
        self.owned.close()

    def grant(self, group, count):
        for grant in self.store.grant(group, count):
            # From now on its bytes may be anything at any moment.
            self.owned.arena.slot_data(grant.slot)[:] = b"\xff" * self.spec.slot_bytes
            self.grants[group].append(grant)

    def commit(self, group, name, num_ranks=2, tenant=0):
        if not self.grants[group]:
            return
        grant = self.grants[group].pop(0)
        fill(self.owned.arena, grant.slot, key(name))
        for rank in range(num_ranks, 2):
            self.owned.arena.set_checksum(grant.slot, rank, 0)
        entry = Entry(grant.slot, grant.epoch, key(name), parent_of(name), 16, tenant)
        (result,) = self.store.commit(group, [entry])
        self.statuses.add(result.status)
        assert result.status is not CommitStatus.STALE, f"grant: slot {grant.slot} was taken from its group"
        if result.location is not None:
            self.heard.append((key(name), result.location))

    def commit_anothers(self, group, number, name):
        """Commit what is not this group's: another's grant, or a page that was committed long ago."""
        grants = [grant for other in GROUPS if other != group for grant in self.grants[other]]
        targets = [(grant.slot, grant.epoch) for grant in grants]
        targets += [(location.slot, location.epoch - 1) for _, location in self.heard]
        if targets:
            slot, epoch = targets[number % len(targets)]
            (result,) = self.store.commit(group, [Entry(slot, epoch, key(name), parent_of(name), 16)])
            self.statuses.add(result.status)

    def abort(self, group):
        assert self.store.abort(group, self.grants[group][:1]) == len(self.grants[group][:1])
        del self.grants[group][:1]

    def die(self, group):
        assert self.store.reclaim(group) == len(self.grants[group]), f"grant: group {group} lost some"
        self.grants[group].clear()

    def acquire(self, reader, number):
        if not self.heard:
            return
        page_key, location = self.heard[number % len(self.heard)]
        if self.readers[reader].acquire([page_key], [location]):
            assert self.holds(page_key, location), (
                f"epoch: slot {location.slot} is not what its reader was told"
            )
            self.held.append((reader, page_key, location))

    def release(self, number):
        if self.held:
            reader, _, location = self.held.pop(number % len(self.held))
            assert self.readers[reader].is_current(location)
            self.readers[reader].release([location.slot])

    def touch(self, name):
        self.store.touch([key(other) for other in range(name - name % 3, name + 1)])

    def drop(self, number):
        if self.heard:
            self.store.drop(self.heard[number % len(self.heard)][1], "corrupt")

    def pin(self, name):
        try:
            self.store.pin(key(name))
        except PinBudgetError:
            assert self.store.num_pinned > 0

    def unpin(self, name):
        self.store.unpin(key(name))

    def clear(self):
        self.store.clear()

    def maintain(self, count):
        self.store.maintain(count)

    def prefault(self):
        self.owned.arena.num_usable_slots = min(self.owned.arena.num_usable_slots + 3, self.spec.num_slots)

    def restart(self, dead):
        """Kill the server, and one of the groups while it is down."""
        self.grants[dead].clear()
        kill(self.owned)
        self.owned = open_arena(self.folder, self.spec, self.safety, prefault=False)
        assert self.owned.is_adopted
        self.changes = []
        living = [group for group in GROUPS if group != dead]
        self.store = PageStore(self.owned.arena, self.changes, self.options, living)

    def holds(self, page_key, location: Location):
        """Tell whether a slot's bytes are a page's."""
        words = numpy.frombuffer(self.owned.arena.slot_data(location.slot), numpy.uint8).reshape(-1, 16)
        return bool((words == numpy.frombuffer(page_key, numpy.uint8)).all())

    def check(self):
        """The store's own proof, then what readers, writers and subscribers rely on."""
        for _, page_key, location in self.held:
            assert self.holds(page_key, location), (
                f"lease: slot {location.slot} is given away under its reader"
            )
        self.store.check()
        granted = [grant.slot for grants in self.grants.values() for grant in grants]
        assert len(granted) == len(set(granted)) == self.store.num_writing
        for grants in self.grants.values():
            for grant in grants:
                assert self.owned.arena.state(grant.slot) is SlotState.WRITING
                assert self.owned.arena.epoch(grant.slot) == grant.epoch
        told = {}
        for change in self.changes:
            if isinstance(change, Stored):
                assert change.parent is None or change.parent in told, "a child is told before its parent"
                told[change.key] = change
            else:
                gone = told.pop(change.key)
                assert (gone.slot, gone.epoch) == (change.slot, change.epoch)
        assert told == {page.key: page for page in self.store.stored()}, "subscribers hold other pages"
        for page in told.values():
            assert self.holds(page.key, Location(page.slot, page.epoch)), f"slot {page.slot} has other bytes"


def random_action(node: ArenaNode, chance):
    """Do one action of those above; three commits of four are of pages that can be committed."""
    group, name, number = chance.choice(GROUPS), chance.randrange(NAMES), chance.randrange(1000)
    is_stored = [location is not None for location in node.store.lookup([key(n) for n in range(NAMES)])]
    wanted = [
        n for n in range(NAMES) if not is_stored[n] and (n % 3 == 0 or is_stored[0 if n == 10 else n - 1])
    ]
    commits = chance.choice(wanted) if wanted and chance.random() < 0.75 else name
    actions = [
        (6, lambda: node.grant(group, 1 + number % 4)),
        (9, lambda: node.commit(group, commits, 1 + (number % 9 > 0), commits % 6 // 3)),
        (1, lambda: node.commit_anothers(group, number, name)),
        (1, lambda: node.abort(group)),
        (1, lambda: node.die(group)),
        (5, lambda: node.acquire(number % 2, number // 2)),
        (4, lambda: node.release(number)),
        (2, lambda: node.touch(name)),
        (1, lambda: node.drop(number)),
        (1, lambda: node.pin(name)),
        (1, lambda: node.unpin(name)),
        (1, lambda: node.maintain(number % 4)),
        (1, node.prefault),
        (0.1, node.clear),
        (0.3, lambda: node.restart(group)),
    ]
    weights = [weight for weight, _ in actions]
    (action,) = chance.choices([action for _, action in actions], weights)
    action()
