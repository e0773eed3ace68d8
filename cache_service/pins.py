"""Pins: pages that eviction leaves alone, within a budget."""

from cache_service.page_tree import PageTree


class PinBudgetError(Exception):
    """The pin would hold more pages than may be held."""


class Pins:
    """Counts pins by slot. A pinned page holds all that it continues: those count against the budget too."""

    def __init__(self, tree: PageTree, max_pages: int) -> None:
        self._tree = tree
        self._max_pages = max_pages
        self._pins: dict[int, int] = {}  # slot -> pins of exactly this page
        self._held: dict[int, int] = {}  # slot -> pins of this page and of all that continue it

    @property
    def num_held(self) -> int:
        """Pages that pins keep from eviction."""
        return len(self._held)

    def holds(self, slot: int) -> bool:
        """Tell whether a pin keeps a slot's page."""
        return slot in self._held

    def pin(self, slot: int) -> None:
        """Pin a page once more; over the budget raise PinBudgetError and pin nothing."""
        more = sum(page not in self._held for page in self._tree.lineage(slot))
        if len(self._held) + more > self._max_pages:
            raise PinBudgetError(
                f"{len(self._held)} pages are pinned and this pin needs {more} more, over the budget of"
                f" {self._max_pages}; unpin some"
            )
        self._pins[slot] = self._pins.get(slot, 0) + 1
        self._hold(slot, 1)

    def unpin(self, slot: int) -> bool:
        """Take one pin back; tell whether there was one."""
        if slot not in self._pins:
            return False
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            del self._pins[slot]
        self._hold(slot, -1)
        return True

    def removed(self, slot: int) -> None:
        """Forget the pins of a page that goes; call before the tree forgets it."""
        count = self._pins.pop(slot, 0)
        if count:
            self._hold(slot, -count)

    def check(self) -> None:
        """Prove the held pages from the pins."""
        held: dict[int, int] = {}
        for slot, count in self._pins.items():
            for page in self._tree.lineage(slot):
                held[page] = held.get(page, 0) + count
        assert held == self._held, f"pins hold {self._held}, by their lineages {held}"
        assert len(held) <= self._max_pages, f"{len(held)} pages are held over a budget of {self._max_pages}"

    def _hold(self, slot: int, count: int) -> None:
        for page in self._tree.lineage(slot):
            self._held[page] = self._held.get(page, 0) + count
            if self._held[page] == 0:
                del self._held[page]
