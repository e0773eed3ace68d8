"""What the KVCacheManager keeps of one slot: its tokens with their keys, and its pages. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cache_service.keys import NamespaceDigest, PageKey, page_keys
from workers.kvcache.arrivals import Origin
from workers.kvcache.page_pool import PagePool, PageState
from workers.kvcache.radix_cache import Node, RadixCache


@dataclass(slots=True, eq=False)
class KeyedTokens:
    """A request's tokens so far, and the keys of their whole pages, each computed once."""

    token_ids: list[int]
    namespace: NamespaceDigest
    page_size: int
    tenant: int
    """The number to which its pages in an arena are charged."""
    _keys: list[PageKey] = field(default_factory=list)

    def keys(self, first: int, end: int) -> list[PageKey]:
        """Return the keys of the pages `first` .. `end - 1`."""
        known = len(self._keys)
        if end > known:
            new_tokens = self.token_ids[known * self.page_size : end * self.page_size]
            parent = self._keys[-1] if known else self.namespace
            self._keys += page_keys(parent, new_tokens, self.page_size)
        return self._keys[first:end]


@dataclass(slots=True, eq=False)
class Row:
    """The pages of one slot, in the order of its tokens.

    pages     p0 p1 p2 p3 p4 p5
              |------|              num_complete: wholly written, or being loaded; with prefix caching the
                                    pages of `path`, which other rows may share
              |--|                  num_readable: of those, loaded; or, on a device that copies by itself,
                                    on their way, so that they come before whatever reads them
              |-|                   num_proven: of those, loaded for certain on every rank
                     |--------|     this row's alone, reserved for tokens to come
    """

    tokens: KeyedTokens
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    num_complete: int = 0
    num_readable: int = 0
    num_proven: int = 0
    origins: Counter[Origin] = field(default_factory=Counter)
    """Pages that it was opened on, by where they were found."""

    def is_readable(self) -> bool:
        """Tell whether no page of its path is still to be loaded."""
        while self.num_readable < len(self.path) and self.path[self.num_readable].is_readable:
            self.num_readable += 1
        return self.num_readable == len(self.path)

    def is_proven(self) -> bool:
        """Tell whether no page of its path may still turn out to be torn."""
        while self.num_proven < len(self.path) and self.path[self.num_proven].is_proven:
            self.num_proven += 1
        return self.num_proven == len(self.path)


@dataclass(frozen=True, slots=True)
class KVStats:
    """Pages by state, and evictions since the start. Cached pages that no request is on are owned too."""

    num_free_pages: int
    num_owned_pages: int
    num_quiescing_pages: int
    num_cached_pages: int
    num_evictable_pages: int
    num_evictions: int


def kv_stats(pool: PagePool, tree: RadixCache) -> KVStats:
    """Count the pages by state."""
    return KVStats(
        num_free_pages=pool.num_free,
        num_owned_pages=pool.num_owned,
        num_quiescing_pages=pool.num_quiescing,
        num_cached_pages=tree.num_pages,
        num_evictable_pages=tree.num_unlocked,
        num_evictions=tree.num_evictions,
    )


def num_released(rows: Sequence[Row], kept: Sequence[Node] = ()) -> int:
    """Return how many pages nobody holds once the slots of these rows are closed, beside those `kept`."""
    num_private = sum(len(row.pages) - len(row.path) for row in rows)
    num_locks = Counter(node for row in rows for node in row.path)
    for node in kept:
        del num_locks[node]
    return num_private + sum(locks == node.num_locks for node, locks in num_locks.items())


def check_rows(
    rows: Mapping[int, Row], pool: PagePool, tree: RadixCache, busy_pages: list[int], *, has_paths: bool
) -> None:
    """Prove that every page is leased by exactly the rows, nodes and moves that hold it.

    `has_paths`: complete pages of a row are in the tree.
    """
    holders = [0] * (pool.num_pages + 1)
    for slot, row in rows.items():
        assert len(set(row.pages)) == len(row.pages), f"slot {slot} has a page twice"
        assert not has_paths or len(row.path) == row.num_complete, f"slot {slot} has a gap in its path"
        for index, page in enumerate(row.pages):
            state = pool.state(page)
            assert state is PageState.OWNED, f"slot {slot} holds page {page}, which is {state.name}"
            shareable = index < len(row.path)
            assert not shareable or row.path[index].page == page, f"slot {slot} left its path at page {page}"
            assert shareable or holders[page] == 0, f"page {page} has two owners, slot {slot} is one"
            holders[page] += 1
    for page in [*(node.page for node in tree.nodes()), *busy_pages]:
        holders[page] += 1
    for page in range(1, pool.num_pages + 1):
        num_leases = pool.num_leases(page)
        assert num_leases == holders[page], f"page {page} has {num_leases} leases, {holders[page]} holders"
