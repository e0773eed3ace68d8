"""PageStore: which page is in which slot of the arena, and which slots may be written.

Owned by the CacheServer's thread, the only one that allocates and frees slots (I7). No sockets, no clock.

    FREE --grant--> WRITING --commit--> READY --evict, unless leased--> FREE
                            --abort---> FREE   --drop--> EVICTING --last lease gone--> FREE
"""

import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cache_service.arena import Arena
from cache_service.arena_format import SlotState
from cache_service.arena_recovery import found_pages, free_the_rest, open_grants
from cache_service.eviction import EvictionPolicy
from cache_service.keys import PageKey
from cache_service.page_index import PageIndex
from cache_service.page_records import CommitResult, CommitStatus, Entry, Grant, Location
from cache_service.relocation_records import ChangeSink, Stored

_EXTRA_LOOKS = 64
"""Candidates one call looks at beyond twice the pages it wants: a store whose pages are all leased is not
searched to its end each time."""


@dataclass(frozen=True)
class PageStoreOptions:
    """How a PageStore shares out its slots; ratios are of all slots."""

    eviction: EvictionPolicy = "s3fifo"
    min_free_ratio: float = 0.02
    """`maintain` evicts when fewer slots are free,"""
    target_free_ratio: float = 0.05
    """until so many are."""
    tenant_ratio: float = 1.0
    """The most that one tenant's pages take."""
    pinned_ratio: float = 0.5
    """The most that pinned pages take, with all that they continue."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_free_ratio <= self.target_free_ratio < 1:
            raise ValueError(
                f"free ratios {self.min_free_ratio} and {self.target_free_ratio}: 0 <= min <= target < 1"
            )
        if not 0 < self.tenant_ratio <= 1 or not 0 <= self.pinned_ratio < 1:
            raise ValueError(
                f"tenant ratio {self.tenant_ratio} must be in (0, 1],"
                f" pinned ratio {self.pinned_ratio} in [0, 1)"
            )


class PageStore:
    """The index over one arena. A `group` is the number of a TP group whose processes share its grants.

    Made over an arena with pages in it, it takes over those whose prefix is whole, and the grants of
    `live_groups`, whose processes may be writing still; the rest is freed. The bytes of pages taken over
    are not looked at: whoever reads one first since then verifies its checksums.
    """

    def __init__(
        self,
        arena: Arena,
        changes: ChangeSink,
        options: PageStoreOptions | None = None,
        live_groups: Collection[int] = (),
    ) -> None:
        options = options or PageStoreOptions()
        num_slots = arena.spec.num_slots
        self.num_evicted = 0
        self.num_refused = 0
        """Evictions that a lease refused."""
        self.num_dropped: Counter[str] = Counter()
        """Pages dropped, by reason."""
        self._arena = arena
        self._min_free = math.ceil(num_slots * options.min_free_ratio)
        self._target_free = math.ceil(num_slots * options.target_free_ratio)
        self._index = PageIndex(
            num_slots,
            options.eviction,
            max_tenant_pages=max(1, int(num_slots * options.tenant_ratio)),
            max_pinned_pages=int(num_slots * options.pinned_ratio),
            changes=changes,
        )
        self._grants: dict[int, set[int]] = {}
        self._draining: set[int] = set()
        self._free = array("i")
        self._num_usable = 0
        self._recover(live_groups)
        self.num_recovered = self.num_ready
        """Pages taken over from a former server."""

    @property
    def num_free(self) -> int:
        """Slots that can be granted now."""
        return len(self._free)

    @property
    def num_writing(self) -> int:
        """Slots granted and not yet committed."""
        return sum(len(slots) for slots in self._grants.values())

    @property
    def num_ready(self) -> int:
        """Pages that can be read."""
        return len(self._index)

    @property
    def num_unusable(self) -> int:
        """Slots whose memory does not exist yet."""
        return self._arena.spec.num_slots - self._num_usable

    @property
    def num_draining(self) -> int:
        """Slots of dropped pages that readers still hold."""
        return len(self._draining)

    @property
    def num_pinned(self) -> int:
        """Pages that pins keep from eviction."""
        return self._index.pins.num_held

    def num_granted(self, group: int) -> int:
        """Return how many slots a group may write."""
        return len(self._grants.get(group, ()))

    def grants_of(self, group: int) -> list[Grant]:
        """Return what a group may write; for one that may have lost an answer."""
        return [Grant(slot, self._arena.epoch(slot)) for slot in sorted(self._grants.get(group, ()))]

    def num_pages_of(self, tenant: int) -> int:
        """Return how many pages are charged to a tenant."""
        return self._index.tenants.count(tenant)

    def grant(self, group: int, num_slots: int) -> list[Grant]:
        """Give a group slots to write, fewer than asked where no more can be evicted."""
        self._take_usable()
        if len(self._free) < num_slots:
            self._free_drained()
            self._evict(num_slots - len(self._free))
        granted = []
        # In order: neighbours in pool and arena move as one copy.
        for slot in sorted(self._free.pop() for _ in range(min(num_slots, len(self._free)))):
            epoch = self._arena.epoch(slot) + 1
            self._arena.describe_grant(slot, group)
            self._arena.set_stamp(slot, epoch, SlotState.WRITING)
            self._grants.setdefault(group, set()).add(slot)
            granted.append(Grant(slot, epoch))
        return granted

    def commit(self, group: int, entries: Sequence[Entry]) -> list[CommitResult]:
        """Make granted slots readable, parents before children; one result an entry, in order."""
        return [self._commit(group, entry) for entry in entries]

    def abort(self, group: int, grants: Sequence[Grant]) -> int:
        """Take back grants that will not be used; return how many were this group's."""
        held = 0
        for grant in grants:
            if self._holds(group, grant.slot, grant.epoch):
                self._free_grant(group, grant.slot)
                held += 1
        return held

    def reclaim(self, group: int) -> int:
        """Free all that a group was granted; only once its processes are dead or have left (I7)."""
        slots = list(self._grants.get(group, ()))
        for slot in slots:
            self._free_grant(group, slot)
        return len(slots)

    def lookup(self, keys: Sequence[PageKey]) -> list[Location | None]:
        """Return where pages can be read, without a lease: they may be gone when the answer arrives."""
        return [self._location(key) for key in keys]

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Count a use of pages, given with all that they continue, parents first; the absent are ignored."""
        self._index.touch(keys)

    def stored(self) -> Iterator[Stored]:
        """Yield every readable page, in no order; for snapshots."""
        for key, slot in self._index.items():
            yield Stored(key, self._index.parent_of(slot), slot, self._arena.epoch(slot))

    def pin(self, key: PageKey) -> bool:
        """Keep a page, with all that it continues, from eviction; False where it is not in the store.

        Raises PinBudgetError. Pins count, and are gone after a restart.
        """
        slot = self._index.slot_of(key)
        if slot is None:
            return False
        self._index.pins.pin(slot)
        return True

    def unpin(self, key: PageKey) -> bool:
        """Take one pin back; False where there is none."""
        slot = self._index.slot_of(key)
        return slot is not None and self._index.pins.unpin(slot)

    def maintain(self, max_pages: int) -> int:
        """Evict at most `max_pages` towards the free slots aimed at; return how many. For idle moments."""
        self._take_usable()
        self._free_drained()
        if len(self._free) >= self._min_free:
            return 0
        return self._evict(min(max_pages, self._target_free - len(self._free)))

    def drop(self, location: Location, reason: str) -> int:
        """Remove a page at once, with all that continue it; return how many went, 0 if it is not there.

        For corrupt pages: no new lease is had on them; a slot that is leased is freed after its last lease.
        """
        slot = location.slot
        if self._index.key_in(slot) is None or self._arena.epoch(slot) != location.epoch:
            return 0
        return self._drop(self._index.tree.subtree(slot), reason)

    def clear(self) -> int:
        """Remove every page, pinned ones too; return how many."""
        roots = self._index.roots()
        return self._drop([slot for root in roots for slot in self._index.tree.subtree(root)], "cleared")

    def check(self) -> None:
        """Prove free + writing + ready + draining + not usable yet == total, headers against index."""
        arena, num_slots = self._arena, self._arena.spec.num_slots
        states = {slot: SlotState.READY for _, slot in self._index.items()}
        lists = (
            (SlotState.FREE, list(self._free)),
            (SlotState.WRITING, [slot for slots in self._grants.values() for slot in slots]),
            (SlotState.EVICTING, list(self._draining)),
            (SlotState.FREE, list(range(self._num_usable, num_slots))),
        )
        for state, slots in lists:
            for slot in slots:
                assert slot not in states, f"slot {slot} is {state.name} and {states[slot].name} at once"
                states[slot] = state
        assert len(states) == num_slots, f"{num_slots - len(states)} slots of {num_slots} are lost"
        tenants: dict[int, list[int]] = {}
        for slot, state in states.items():
            found, epoch = arena.state(slot), arena.epoch(slot)
            assert found is state, f"slot {slot} is {found.name} in its header, not {state.name}"
            assert epoch % 2 == (state is SlotState.WRITING), f"slot {slot} is {state.name} at epoch {epoch}"
        for group, slots_of_group in self._grants.items():
            assert slots_of_group, f"group {group} is listed without a grant"
            assert all(arena.group(slot) == group for slot in slots_of_group), (
                f"a slot is not group {group}'s"
            )
        for key, slot in self._index.items():
            assert arena.key(slot) == key, f"slot {slot} has another key in its header than in the index"
            assert arena.parent(slot) == self._index.parent_of(slot), (
                f"slot {slot}: a child without its parent"
            )
            tenants.setdefault(arena.tenant(slot), []).append(slot)
            assert arena.is_complete(slot), f"slot {slot} lacks a rank's bundle"
        self._index.check(tenants)

    def _commit(self, group: int, entry: Entry) -> CommitResult:
        slot, arena = entry.slot, self._arena
        if arena.safety.grants and not self._holds(group, slot, entry.epoch):
            return CommitResult(CommitStatus.STALE, self._location(entry.key))
        refusal = self._refusal(entry)
        if refusal is not None:
            self._free_grant(group, slot)
            return CommitResult(refusal, self._location(entry.key))
        self._end_grant(group, slot)
        arena.describe_page(slot, entry.key, entry.parent, entry.length, entry.tenant)
        epoch = entry.epoch + 1
        arena.fence()  # READY comes after all that it vouches for
        arena.set_stamp(slot, epoch, SlotState.READY)
        self._index.insert(slot, epoch, entry.key, entry.parent, entry.tenant)
        return CommitResult(CommitStatus.COMMITTED, Location(slot, epoch))

    def _refusal(self, entry: Entry) -> CommitStatus | None:
        if entry.key in self._index:
            return CommitStatus.DUPLICATE
        if entry.parent is not None and entry.parent not in self._index:
            return CommitStatus.NO_PARENT
        if self._arena.safety.whole_pages and not self._arena.is_complete(entry.slot):
            return CommitStatus.INCOMPLETE
        if self._index.tenants.is_full(entry.tenant) and not self._evict_of_tenant(
            entry.tenant, entry.parent
        ):
            return CommitStatus.OVER_QUOTA
        return None

    def _holds(self, group: int, slot: int, epoch: int) -> bool:
        return slot in self._grants.get(group, ()) and self._arena.epoch(slot) == epoch

    def _end_grant(self, group: int, slot: int) -> None:
        slots = self._grants.get(group, set())
        slots.discard(slot)
        if not slots:
            self._grants.pop(group, None)

    def _free_grant(self, group: int, slot: int) -> None:
        self._end_grant(group, slot)
        self._free_slot(slot, self._arena.epoch(slot) + 1)

    def _free_slot(self, slot: int, epoch: int) -> None:
        self._arena.set_stamp(slot, epoch, SlotState.FREE)
        self._free.append(slot)

    def _location(self, key: PageKey) -> Location | None:
        slot = self._index.slot_of(key)
        return None if slot is None else Location(slot, self._arena.epoch(slot))

    def _evict(self, num_pages: int) -> int:
        """Free up to `num_pages` slots in the order's turn."""
        evicted = 0
        for _ in range(2 * num_pages + _EXTRA_LOOKS):
            slot = self._index.order.candidate() if evicted < num_pages else None
            if slot is None:
                break
            if self._try_evict(self._leaf_under(slot)):
                evicted += 1
            else:
                self._index.order.defer(slot)
        return evicted

    def _evict_of_tenant(self, tenant: int, parent: PageKey | None) -> bool:
        """Make room for one page of a tenant, in its own part; the page's parent stays."""
        kept = None if parent is None else self._index.slot_of(parent)
        for _ in range(_EXTRA_LOOKS):
            slot = self._index.tenants.oldest(tenant)
            if slot is None:
                return False
            leaf = self._leaf_under(slot)
            if leaf == kept or not self._try_evict(leaf):
                self._index.tenants.touch(slot)
            elif not self._index.tenants.is_full(tenant):
                return True
        return False

    def _leaf_under(self, slot: int) -> int:
        return self._index.tree.leaf_under(slot) if self._arena.safety.children_first else slot

    def _try_evict(self, slot: int) -> bool:
        """Free a page's slot unless it is pinned or leased (I7: mark, fence, then look for leases)."""
        if self._index.pins.holds(slot):
            return False
        arena, epoch = self._arena, self._arena.epoch(slot)
        is_leased = not arena.safety.marks_first and self._is_leased(slot)
        arena.set_stamp(slot, epoch, SlotState.EVICTING)
        if arena.safety.marks_first:
            arena.fence()
            is_leased = self._is_leased(slot)
        if is_leased:
            arena.set_stamp(slot, epoch, SlotState.READY)
            self.num_refused += 1
            return False
        self._index.remove(slot, epoch, was_evicted=True)
        self._free_slot(slot, epoch)
        self.num_evicted += 1
        return True

    def _drop(self, slots: list[int], reason: str) -> int:
        for slot in slots:
            epoch = self._arena.epoch(slot)
            self._arena.set_stamp(slot, epoch, SlotState.EVICTING)
            self._index.remove(slot, epoch, was_evicted=False)
        self._draining.update(slots)
        self._free_drained()
        self.num_dropped[reason] += len(slots)
        return len(slots)

    def _free_drained(self) -> None:
        if not self._draining:
            return
        self._arena.fence()
        for slot in [slot for slot in self._draining if not self._is_leased(slot)]:
            self._draining.discard(slot)
            self._free_slot(slot, self._arena.epoch(slot))

    def _is_leased(self, slot: int) -> bool:
        return self._arena.safety.leases and self._arena.is_leased(slot)

    def _take_usable(self) -> None:
        usable = self._arena.num_usable_slots
        if usable > self._num_usable:
            self._free.extend(range(usable - 1, self._num_usable - 1, -1))  # taken from the end: lowest first
            self._num_usable = usable

    def _recover(self, live_groups: Collection[int]) -> None:
        """Take over what a former server left: pages, open grants, and slots that readers still hold."""
        arena, self._num_usable = self._arena, self._arena.num_usable_slots
        taken = set()
        for slot, group in open_grants(arena, live_groups):
            self._grants.setdefault(group, set()).add(slot)
            taken.add(slot)
        for page in found_pages(arena):
            has_parent = page.parent is None or page.parent in self._index
            if has_parent and not self._index.tenants.is_full(page.tenant):
                self._index.insert(*page)
                taken.add(page.slot)
        free, self._draining = free_the_rest(arena, taken)
        self._free.extend(reversed(free))
