"""RadixCache: the prefix tree over pages, keyed by PageKey.

Owned by the KVCacheManager in rank 0's step loop thread. A PageKey names its whole prefix, so the tree is a
dict of nodes that know their parents: no node is ever split, and a node is one page.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from cache_service.keys import PageKey
from workers.kvcache.page_pool import PagePool, PageState, Safety
from workers.protocol import KVEvent


class Node:
    """One page of a prefix. `parent` is None in the first page of its namespace."""

    __slots__ = (
        "is_busy",
        "is_proven",
        "is_readable",
        "is_saved",
        "key",
        "num_children",
        "num_locks",
        "page",
        "parent",
        "tenant",
        "was_tried",
    )

    def __init__(
        self, key: PageKey, page: int, parent: "Node | None", tenant: int, *, is_readable: bool
    ) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.tenant = tenant
        """The number to which its copy in an arena is charged."""
        self.num_children = 0
        self.num_locks = 1
        self.is_readable = is_readable
        """False while its page is being loaded."""
        self.is_proven = is_readable
        """False until its LOAD, if it had one, is over on every rank: until then it may turn out torn."""
        self.is_busy = False
        """A SAVE or LOAD of its page is under way: it is not evicted before that is over (I6, I11)."""
        self.is_saved = False
        """As far as is known its page is in the node's arena too."""
        self.was_tried = False
        """A SAVE of its page began since a request last went on it: one is enough, else it might never go."""


class RadixCache:
    """Holds one lease on the page of every node; each request that is on a node holds one more, its lock.

    Eviction takes the leaf unused for longest, in O(1). `_unlocked` keeps the nodes that only the tree holds,
    in the order in which they were let go, and a path is let go leaf first. A node's descendants are unlocked
    when it is (requests lock whole paths), so they stand before it, and the first in line is always a leaf:

        a - b - c      request 1 ran on a b c, then request 2 on a b d:      _unlocked = c, d, b, a
             \\- d

    Busy nodes are passed over, and so is what is above them.
    """

    def __init__(self, pool: PagePool, safety: Safety | None = None) -> None:
        self._pool = pool
        self._safety = safety or Safety()
        self._nodes: dict[PageKey, Node] = {}
        self._unlocked: OrderedDict[PageKey, Node] = OrderedDict()
        self._events: list[KVEvent] = []
        self.num_evictions = 0

    @property
    def num_pages(self) -> int:
        """Pages in the tree."""
        return len(self._nodes)

    @property
    def num_unlocked(self) -> int:
        """Pages that only the tree holds: all of them can be evicted, one after another."""
        return len(self._unlocked)

    def is_locked(self, node: Node) -> bool:
        """Tell whether a running request is on the node."""
        return node.num_locks > 0

    def find(self, key: PageKey) -> Node | None:
        """Return the node of one key."""
        return self._nodes.get(key)

    def nodes(self) -> Iterable[Node]:
        """Return all nodes, parents before their children."""
        return self._nodes.values()

    def match(self, keys: Iterable[PageKey]) -> list[Node]:
        """Return the nodes of the longest known prefix of `keys`. It neither locks nor counts as a use."""
        path: list[Node] = []
        for key in keys:
            node = self._nodes.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def lock(self, path: Iterable[Node]) -> None:
        """Hold nodes for a running request. The nodes above them are locked by the same request."""
        for node in path:
            self._pool.lease(node.page)
            node.num_locks += 1
            node.was_tried = False
            self._unlocked.pop(node.key, None)

    def unlock(self, path: Sequence[Node], last_step: int) -> None:
        """Let a request's whole path go, leaf first. `last_step`: the last planned step that may read it."""
        for node in reversed(path):
            self._pool.release(node.page, last_step)
            node.num_locks -= 1
            if not node.num_locks and node.key in self._nodes:
                self._unlocked[node.key] = node

    def insert(
        self, key: PageKey, page: int, parent: Node | None, tenant: int = 0, *, is_readable: bool = True
    ) -> Node:
        """Add a page below `parent`: complete, or not readable yet, which its load will make it.

        The caller's lease on the page becomes its lock on the node.
        """
        assert key not in self._nodes, "the key is in the tree: its page is the one to use"
        node = self._nodes[key] = Node(key, page, parent, tenant, is_readable=is_readable)
        if parent is not None:
            parent.num_children += 1
        self._pool.lease(page)
        self._tell("stored", key)
        return node

    def evict(self, *, only_idle: bool = False, may_go: Callable[[Node], bool] | None = None) -> bool:
        """Drop the leaf unused for longest that is not busy and that `may_go`; False: there is none.

        `only_idle`: only if the first in line becomes FREE at once.
        """
        for node in self._unlocked.values():
            if node.num_children or (node.is_busy and self._safety.busy_stays):
                continue
            if only_idle and not self._pool.is_idle(node.page):
                return False
            if may_go is not None and not may_go(node):
                continue
            self._remove(node)
            self.num_evictions += 1
            return True
        return False

    def drop(self, roots: Iterable[Node]) -> None:
        """Remove nodes that no request is on, and all below them, busy ones too: their bytes are not good.

        A move under way keeps its own lease on the page.
        """
        dropped = dict.fromkeys(roots)
        for node in self._nodes.values():  # parents come before their children
            if node.parent in dropped:
                dropped[node] = None
        for node in reversed(dropped):
            if self._nodes.get(node.key) is node:
                assert not node.num_locks, "a request is on a node that is dropped"
                self._remove(node)

    def take_events(self) -> list[KVEvent]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def snapshot(self) -> list[bytes]:
        """Return the keys of all pages in the tree, parents first."""
        return list(self._nodes)

    def check(self) -> None:
        """Prove that children have parents, counts hold and eviction meets children before parents."""
        num_children: dict[PageKey, int] = {}
        for key, node in self._nodes.items():
            assert node.key == key and self._pool.state(node.page) is PageState.OWNED, (
                f"the tree holds page {node.page}, which is {self._pool.state(node.page).name}"
            )
            assert (node.num_locks == 0) == (key in self._unlocked), (
                f"page {node.page} of the tree has {node.num_locks} locks and is "
                f"{'un' if key in self._unlocked else ''}locked"
            )
            num_leases = self._pool.num_leases(node.page)
            assert num_leases > node.num_locks, (
                f"page {node.page} of the tree has {num_leases} leases, {node.num_locks} locks"
            )
            assert node.is_readable or node.is_busy, f"page {node.page} of the tree will never be readable"
            if node.parent is not None:
                assert self._nodes.get(node.parent.key) is node.parent, "a node outlived its parent"
                num_children[node.parent.key] = num_children.get(node.parent.key, 0) + 1
        for key, node in self._nodes.items():
            assert node.num_children == num_children.get(key, 0), "a node miscounts its children"
        for node in self._unlocked.values():
            assert num_children.get(node.key, 0) == 0, "a node comes up for eviction before its children"
            if node.parent is not None:
                num_children[node.parent.key] -= 1

    def _remove(self, node: Node) -> None:
        del self._unlocked[node.key], self._nodes[node.key]
        if node.parent is not None:
            node.parent.num_children -= 1
        self._pool.release(node.page)
        self._tell("removed", node.key)

    def _tell(self, kind: Literal["stored", "removed"], key: PageKey) -> None:
        if self._events and self._events[-1].kind == kind:
            self._events[-1].keys.append(key)
        else:
            self._events.append(KVEvent(kind, [key]))
