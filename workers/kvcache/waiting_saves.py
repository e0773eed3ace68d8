"""WaitingSaves: pages to be saved for which there was no grant yet, or no room on the MoveBoard.

Owned by the HostTier. A page waits while it is on the device, so there are no more of them than pages.
"""

from collections import OrderedDict
from dataclasses import dataclass

from cache_service.keys import PageKey
from workers.kvcache.radix_cache import Node


@dataclass(slots=True)
class _Waiting:
    node: Node
    reason: str
    """What it waits for, as a word."""
    is_leaving: bool = False
    """It is to be evicted once it is saved."""


class WaitingSaves:
    """In the order in which they came; a page that waits for its parent stands behind it."""

    def __init__(self) -> None:
        self._pages: OrderedDict[PageKey, _Waiting] = OrderedDict()
        self.num_leaving = 0
        """Of them, those that are to be evicted once they are saved."""

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, node: Node) -> bool:
        waiting = self._pages.get(node.key)
        return waiting is not None and waiting.node is node

    @property
    def first(self) -> Node:
        """The next to be saved."""
        return next(iter(self._pages.values())).node

    def reason(self, node: Node) -> str:
        """Return what a page waits for that does."""
        return self._pages[node.key].reason

    def add(self, node: Node, reason: str) -> None:
        """Have a page wait; one that does already keeps its place."""
        if node in self:
            self._pages[node.key].reason = reason
            return
        stale = self._pages.pop(node.key, None)
        self.num_leaving -= stale is not None and stale.is_leaving
        self._pages[node.key] = _Waiting(node, reason)

    def add_behind(self, node: Node, parent: Node) -> None:
        """Have a page wait whose parent does."""
        self.add(node, self.reason(parent))
        self._pages.move_to_end(node.key)

    def leave(self, node: Node) -> None:
        """Note that a page which waits is to be evicted once it is saved."""
        waiting = self._pages[node.key]
        self.num_leaving += not waiting.is_leaving
        waiting.is_leaving = True

    def remove(self, node: Node) -> bool:
        """Have a page wait no more, if it did; tell whether it is to be evicted once it is saved."""
        if node not in self:
            return False
        is_leaving = self._pages.pop(node.key).is_leaving
        self.num_leaving -= is_leaving
        return is_leaving

    def nodes(self) -> list[Node]:
        """Return the pages that wait."""
        return [waiting.node for waiting in self._pages.values()]


def unsaved_chain(node: Node) -> list[Node]:
    """Return a node with all above it that the arena has not, parents first: it takes no orphans."""
    chain = [node]
    while (parent := chain[-1].parent) is not None and not (parent.is_saved or parent.is_busy):
        chain.append(parent)
    return chain[::-1]
