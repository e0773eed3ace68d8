"""KVCacheManager: the one KV object the Scheduler talks to.

It owns the PagePool, the RadixCache and every slot's row of pages, writes the ops that make all ranks' page
tables equal to them (I1), and numbers the relocations (I8). Lives in rank 0's step loop thread.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cache_service.keys import NamespaceDigest, PageKey, page_keys, salted
from workers.kvcache.page_pool import PagePool, PageState, Safety
from workers.kvcache.radix_cache import Node, RadixCache
from workers.plan import (
    CloseSlot,
    CompletePages,
    FreePages,
    OpenSlot,
    OwnPages,
    PlanOp,
    RelocationVersion,
    SetRow,
)
from workers.protocol import KVEventBatch


@dataclass(slots=True, eq=False)
class KeyedTokens:
    """A request's tokens so far, and the keys of their whole pages, each computed once."""

    token_ids: list[int]
    namespace: NamespaceDigest
    page_size: int
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
class _Row:
    """The pages of one slot, in the order of its tokens.

    pages     p0 p1 p2 p3 p4 p5
              |------|              num_complete: wholly written; with prefix caching the pages of `path`,
                                    which other rows may share
                     |--------|     this row's alone, reserved for tokens to come
    """

    tokens: KeyedTokens
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    num_complete: int = 0


@dataclass(frozen=True, slots=True)
class KVStats:
    """Pages by state, and evictions since the start. Cached pages that no request is on are owned too."""

    num_free_pages: int
    num_owned_pages: int
    num_quiescing_pages: int
    num_cached_pages: int
    num_evictable_pages: int
    num_evictions: int


class KVCacheManager:
    """Gives pages to slots, shares complete ones by PageKey, and logs both as PlanOps.

    A slot's life: `open`, then per step `reserve` before it and `commit` after it, then `close`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        namespace: NamespaceDigest,
        incarnation: int,
        *,
        prefix_caching: bool = True,
        safety: Safety | None = None,
    ) -> None:
        self.page_size = page_size
        self._safety = safety or Safety()
        self._pool = PagePool(num_pages, self._safety)
        self._tree = RadixCache(self._pool)
        self._namespace = namespace
        self._prefix_caching = prefix_caching
        self._rows: dict[int, _Row] = {}
        self._ops: list[PlanOp] = []
        self._version = RelocationVersion(incarnation, 0)
        self._event_version = 0
        self._planned_step = 0

    @property
    def num_pages(self) -> int:
        """Pages that requests can own."""
        return self._pool.num_pages

    @property
    def version(self) -> RelocationVersion:
        """The relocation version once all ops are applied, those not yet taken included."""
        return self._version

    @property
    def has_ops(self) -> bool:
        """Tell whether the ranks have something to apply."""
        return bool(self._ops)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def keyed(self, token_ids: list[int], tenant_salt: bytes) -> KeyedTokens:
        """Wrap a request's tokens for `open`. The list stays the caller's, who may append to it."""
        return KeyedTokens(token_ids, salted(self._namespace, tenant_salt), self.page_size)

    def num_lacking(
        self, tokens: KeyedTokens, num_tokens: int, num_spare_pages: int, closing: Sequence[int] = ()
    ) -> int:
        """Return how many pages are too few to open a request of `num_tokens` and leave spare ones over.

        Its cached prefix counts as had; evictable and quiescing pages count as there, and so does what slots
        `closing` would release. 0 or less: it fits.
        """
        path = self._match(tokens)
        num_evictable = self._tree.num_unlocked - sum(not self._tree.is_locked(node) for node in path)
        num_available = self._pool.num_free + self._pool.num_quiescing + num_evictable
        num_available += self._num_released(closing, kept=path)
        return self.pages_for(num_tokens) - len(path) + num_spare_pages - num_available

    def open(self, op: OpenSlot, tokens: KeyedTokens) -> int:
        """Open a slot on the longest cached prefix and return that prefix's length.

        At least one token is left to compute, so that there are logits to sample from.
        """
        assert op.slot not in self._rows, f"slot {op.slot} is open"
        path = self._match(tokens)
        self._tree.lock(path)
        pages = [node.page for node in path]
        self._rows[op.slot] = _Row(tokens, pages, path, len(path))
        self._ops.append(op)
        if path:
            self._set_row(op.slot, 0, list(pages), [node.key for node in path])
        return len(path) * self.page_size

    def reserve(self, slot: int, num_tokens: int) -> bool:
        """Own the pages of the slot's first `num_tokens` tokens, or change no row and return False.

        Evicts cached pages as needed, but none while enough of them are quiescing: see `is_coming`.
        """
        row = self._rows[slot]
        num_missing = self.pages_for(num_tokens) - len(row.pages)
        if num_missing <= 0:
            return True
        self._make_room(num_missing)
        if self._pool.num_free < num_missing:
            return False
        pages = self._pool.allocate(num_missing)
        self._ops.append(OwnPages(pages, self._generations(pages)))
        self._relocated()
        self._set_row(slot, len(row.pages), pages, [])
        row.pages += pages
        return True

    def is_reserved(self, slot: int, num_tokens: int) -> bool:
        """Tell whether the slot owns the pages of its first `num_tokens` tokens."""
        return num_tokens <= len(self._rows[slot].pages) * self.page_size or not self._safety.reservations

    def is_coming(self, slot: int, num_tokens: int) -> bool:
        """Tell whether a reservation that failed will succeed once all quiescing pages are free."""
        num_missing = self.pages_for(num_tokens) - len(self._rows[slot].pages)
        return num_missing <= self._pool.num_free + self._pool.num_quiescing

    def commit(self, slot: int, num_tokens: int) -> None:
        """Note that the slot's first `num_tokens` tokens are computed. Whole pages enter the tree at once.

        Where the tree has the page already, the row goes over to it and its own copy is released.
        """
        row = self._rows[slot]
        num_complete = num_tokens // self.page_size
        if num_complete == row.num_complete:
            return
        assert num_complete <= len(row.pages), (
            f"slot {slot} wrote {num_tokens} tokens into {len(row.pages)} pages"
        )
        keys = row.tokens.keys(row.num_complete, num_complete)
        own_pages: list[int] = []
        own_keys: list[PageKey] = []
        for index, key in enumerate(keys, row.num_complete):
            page = row.pages[index]
            shared = self._tree.find(key) if self._prefix_caching else None
            if shared is not None:
                self._share(slot, row, index, shared)
                continue
            own_pages.append(page)
            own_keys.append(key)
            if self._prefix_caching:
                row.path.append(self._tree.insert(key, page, row.path[-1] if row.path else None))
        if own_pages:
            self._ops.append(CompletePages(own_pages, list(own_keys)))
        row.num_complete = num_complete

    def close(self, slot: int) -> None:
        """Give the slot's pages back. Complete ones stay in the tree until they are evicted."""
        row = self._rows.pop(slot)
        self._ops.append(CloseSlot(slot))
        for page in row.pages[len(row.path) :]:
            self._pool.release(page, self._planned_step)
        self._tree.unlock(row.path, self._planned_step)
        self._log_freed()

    def planned(self, step: int) -> None:
        """Note that `step` is planned: pages released from now on may be touched by it."""
        assert step > self._planned_step, f"step {step} is planned after step {self._planned_step}"
        self._planned_step = step

    def completed(self, step: int) -> None:
        """Free what waited for `step`: the minimum over all ranks of the last step each has completed."""
        assert step <= self._planned_step, (
            f"step {step} is complete, the last planned is {self._planned_step}"
        )
        self._pool.completed(step)
        self._log_freed()

    def take_ops(self) -> list[PlanOp]:
        """Return the ops since the last call, in the order in which every rank applies them."""
        ops, self._ops = self._ops, []
        return ops

    def take_events(self) -> KVEventBatch | None:
        """Return the news of the prefix tree since the last call."""
        events = self._tree.take_events()
        if not events:
            return None
        first, self._event_version = self._event_version, self._event_version + len(events)
        return KVEventBatch(self._version.incarnation, first, self._event_version, events)

    def snapshot(self) -> tuple[int, list[bytes]]:
        """Return the events' version and the keys on the device.

        Events not yet taken are in it already; taking them in again changes nothing.
        """
        return self._event_version, self._tree.snapshot()

    def stats(self) -> KVStats:
        """Return the pages by state and the evictions so far."""
        return KVStats(
            num_free_pages=self._pool.num_free,
            num_owned_pages=self._pool.num_owned,
            num_quiescing_pages=self._pool.num_quiescing,
            num_cached_pages=self._tree.num_pages,
            num_evictable_pages=self._tree.num_unlocked,
            num_evictions=self._tree.num_evictions,
        )

    def check(self) -> None:
        """Prove that every page is free, quiescing, or leased by exactly the rows and nodes that hold it."""
        self._pool.check()
        self._tree.check()
        holders = [0] * (self._pool.num_pages + 1)
        for slot, row in self._rows.items():
            assert len(set(row.pages)) == len(row.pages), f"slot {slot} has a page twice"
            assert not self._prefix_caching or len(row.path) == row.num_complete, (
                f"slot {slot} has a gap in its path"
            )
            for index, page in enumerate(row.pages):
                state = self._pool.state(page)
                assert state is PageState.OWNED, f"slot {slot} holds page {page}, which is {state.name}"
                shareable = index < len(row.path)
                assert not shareable or row.path[index].page == page, (
                    f"slot {slot} left its path at page {page}"
                )
                assert shareable or holders[page] == 0, f"page {page} has two owners, slot {slot} is one"
                holders[page] += 1
        for node in self._tree.nodes():
            holders[node.page] += 1
        for page in range(1, self._pool.num_pages + 1):
            num_leases = self._pool.num_leases(page)
            assert num_leases == holders[page], (
                f"page {page} has {num_leases} leases, {holders[page]} holders"
            )

    def _match(self, tokens: KeyedTokens) -> list[Node]:
        if not self._prefix_caching:
            return []
        return self._tree.match(tokens.keys(0, (len(tokens.token_ids) - 1) // self.page_size))

    def _num_released(self, closing: Sequence[int], kept: Sequence[Node]) -> int:
        """Return how many pages nobody holds once the slots are closed, beside those `kept`."""
        rows = [self._rows[slot] for slot in closing]
        num_private = sum(len(row.pages) - len(row.path) for row in rows)
        num_locks = Counter(node for row in rows for node in row.path)
        for node in kept:
            del num_locks[node]
        # The tree's own lease on a node's page is no lock.
        num_unlocked = sum(locks == self._pool.num_leases(node.page) - 1 for node, locks in num_locks.items())
        return num_private + num_unlocked

    def _make_room(self, num_pages: int) -> None:
        while self._pool.num_free < num_pages:
            enough_coming = self._pool.num_free + self._pool.num_quiescing >= num_pages
            if not self._tree.evict(only_idle=enough_coming):
                break
        self._log_freed()

    def _share(self, slot: int, row: _Row, index: int, node: Node) -> None:
        """Swap the slot's own copy of a page for the tree's."""
        self._tree.lock([node])
        row.path.append(node)
        self._pool.release(row.pages[index], self._planned_step)
        row.pages[index] = node.page
        self._set_row(slot, index, [node.page], [node.key])
        self._log_freed()

    def _set_row(self, slot: int, first: int, pages: list[int], keys: Sequence[PageKey]) -> None:
        self._ops.append(SetRow(slot, first, pages, self._generations(pages), list(keys)))

    def _generations(self, pages: list[int]) -> list[int]:
        return [self._pool.generation(page) for page in pages]

    def _log_freed(self) -> None:
        pages = self._pool.take_freed()
        if pages:
            self._ops.append(FreePages(pages))
            self._relocated()

    def _relocated(self) -> None:
        self._version = RelocationVersion(self._version.incarnation, self._version.counter + 1)
