"""PageIndex: the readable pages by key and slot, with what eviction, quotas and pins know of them.

Part of the PageStore, which alone calls it. Every change of it is told to the relocation log.
"""

from collections.abc import Iterator, Sequence

from cache_service.eviction import EvictionPolicy, eviction_order
from cache_service.keys import PageKey
from cache_service.page_tree import PageTree
from cache_service.pins import Pins
from cache_service.relocation_records import ChangeSink, Removed, Stored
from cache_service.tenant_pages import TenantPages


class PageIndex:
    """Pages, each in one slot. Plain ints, about 200 bytes a page."""

    def __init__(
        self,
        num_slots: int,
        eviction: EvictionPolicy,
        max_tenant_pages: int,
        max_pinned_pages: int,
        changes: ChangeSink,
    ) -> None:
        self._changes = changes
        self._slots: dict[PageKey, int] = {}
        self._keys: list[PageKey | None] = [None] * num_slots
        self.tree = PageTree(num_slots)
        self.order = eviction_order(eviction, num_slots)
        self.tenants = TenantPages(num_slots, max_tenant_pages)
        self.pins = Pins(self.tree, max_pinned_pages)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._slots

    def slot_of(self, key: PageKey) -> int | None:
        """Return the slot of a page."""
        return self._slots.get(key)

    def key_in(self, slot: int) -> PageKey | None:
        """Return the page in a slot; None also for a slot that does not exist."""
        return self._keys[slot] if 0 <= slot < len(self._keys) else None

    def parent_of(self, slot: int) -> PageKey | None:
        """Return the page that the page in a slot continues."""
        parent = self.tree.parent(slot)
        return None if parent is None else self._keys[parent]

    def items(self) -> Iterator[tuple[PageKey, int]]:
        """Yield every page and its slot, in no order."""
        yield from self._slots.items()

    def roots(self) -> list[int]:
        """Return the slots of all first pages."""
        return [slot for slot in self._slots.values() if self.tree.parent(slot) is None]

    def insert(self, slot: int, epoch: int, key: PageKey, parent: PageKey | None, tenant: int) -> None:
        """Add a page; its parent is there, itself is not."""
        self._slots[key] = slot
        self._keys[slot] = key
        self.tree.add(slot, None if parent is None else self._slots[parent])
        self.order.add(slot, key)
        self.tenants.add(slot, tenant)
        self._changes.append(Stored(key, parent, slot, epoch))

    def remove(self, slot: int, epoch: int, was_evicted: bool) -> None:
        """Remove the page in a slot; no page continues it."""
        key = self._keys[slot]
        assert key is not None, f"slot {slot} holds no page"
        self.pins.removed(slot)
        self.tree.remove(slot)
        self.order.remove(slot, key, was_evicted)
        self.tenants.remove(slot)
        self._keys[slot] = None
        del self._slots[key]
        self._changes.append(Removed(key, slot, epoch))

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Count a use of pages, parents first; the absent are ignored."""
        for key in reversed(keys):  # so that parents are the last used
            slot = self._slots.get(key)
            if slot is not None:
                self.order.touch(slot)
                self.tenants.touch(slot)

    def check(self, tenants: dict[int, list[int]]) -> None:
        """Prove that index, tree, order, tenants and pins hold the same pages; slots by tenant are given."""
        slots = sorted(self._slots.values())
        kept = [slot for slot, key in enumerate(self._keys) if key is not None]
        assert slots == kept, "index and keys by slot differ"
        for key, slot in self._slots.items():
            assert self._keys[slot] == key, f"slot {slot} holds another key than the index says"
            parent = self.tree.parent(slot)
            assert parent is None or self._keys[parent] is not None, (
                f"slot {slot}: a child without its parent"
            )
        self.order.check(slots)
        self.tenants.check(tenants)
        self.pins.check()
