"""PageTree: which page in the store continues which, by slots; children go before parents."""

from array import array
from collections.abc import Iterator

_NONE = -1


class PageTree:
    """A forest over slots in four arrays. The children of a page are a ring, the oldest first."""

    def __init__(self, num_slots: int) -> None:
        self._parent = array("i", [_NONE]) * num_slots
        self._oldest_child = array("i", [_NONE]) * num_slots
        self._younger = array("i", [_NONE]) * num_slots  # in the ring of a page's siblings
        self._older = array("i", [_NONE]) * num_slots

    def add(self, slot: int, parent: int | None) -> None:
        """Add a page without children."""
        if parent is None:
            return
        self._parent[slot] = parent
        first = self._oldest_child[parent]
        if first == _NONE:
            self._oldest_child[parent] = self._younger[slot] = self._older[slot] = slot
            return
        last = self._older[first]
        self._younger[last] = self._older[first] = slot
        self._younger[slot], self._older[slot] = first, last

    def remove(self, slot: int) -> None:
        """Remove a page that has no children."""
        parent = self._parent[slot]
        if parent == _NONE:
            return
        self._parent[slot] = _NONE
        younger, older = self._younger[slot], self._older[slot]
        self._younger[older], self._older[younger] = younger, older
        if self._oldest_child[parent] == slot:
            self._oldest_child[parent] = _NONE if younger == slot else younger

    def parent(self, slot: int) -> int | None:
        """Return the page that a page continues."""
        parent = self._parent[slot]
        return None if parent == _NONE else parent

    def leaf_under(self, slot: int) -> int:
        """Return a page without children that continues `slot`, or `slot` itself: always the oldest child."""
        while (child := self._oldest_child[slot]) != _NONE:
            slot = child
        return slot

    def children(self, slot: int) -> Iterator[int]:
        """Yield the pages that continue this one directly, the oldest first."""
        first = child = self._oldest_child[slot]
        while child != _NONE:
            yield child
            child = self._younger[child]
            if child == first:
                return

    def lineage(self, slot: int) -> Iterator[int]:
        """Yield a page and all that it continues, back to its first page."""
        while slot != _NONE:
            yield slot
            slot = self._parent[slot]

    def subtree(self, slot: int) -> list[int]:
        """Return a page and all that continue it, children before parents."""
        found = [slot]
        for page in found:  # grows while it is read
            found += self.children(page)
        return found[::-1]
