"""KVCacheManager: the one KV object the Scheduler talks to.

It owns the PagePool, the RadixCache and every slot's row of pages, writes the ops that make all ranks' page
tables equal to them (I1), and numbers the relocations (I8). Lives in rank 0's step loop thread.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from cache_service.keys import NamespaceDigest, PageKey, salted
from workers.kvcache.arrivals import Origin
from workers.kvcache.fetch_costs import FetchCosts
from workers.kvcache.host_cache import HostCache, MoveStatuses, RemotePages
from workers.kvcache.host_tier import HostTier, WritePolicy
from workers.kvcache.page_pool import PagePool, Safety
from workers.kvcache.prefetcher import Prefetch, Prefetcher, PrefetchOptions
from workers.kvcache.radix_cache import Node, RadixCache
from workers.kvcache.rows import KeyedTokens, KVStats, Row, check_rows, kv_stats, num_released
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
from workers.protocol import FetchHint, KVEventBatch


class KVCacheManager:
    """Gives pages to slots, shares complete ones by PageKey, and logs both as PlanOps.

    A slot's life: `open`, then per step `reserve` before it and `commit` after it, then `close`. With a
    HostTier (`attach_tier`) a slot may open on pages that are still loading: it waits for `is_readable`.
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
        self._tree = RadixCache(self._pool, self._safety)
        self._namespace = namespace
        self._prefix_caching = prefix_caching
        self._rows: dict[int, Row] = {}
        self._ops: list[PlanOp] = []
        self._version = RelocationVersion(incarnation, 0)
        self._event_version = 0
        self._planned_step = 0
        self._tier: HostTier | None = None
        self._prefetcher: Prefetcher | None = None
        self.costs = FetchCosts(0, page_size)
        """What getting pages takes, as measured; with a prefetcher it decides by them."""
        self._failed: list[Node] = []

    def attach_tier(self, host: HostCache, moves: MoveStatuses, policy: WritePolicy) -> HostTier:
        """Save pages to and load them from an arena from now on; return the tier, whose stats it keeps."""
        assert self._prefix_caching, "without prefix caching no page has a use beyond its request"
        self._tier = HostTier(
            host, moves, self._pool, self._tree, self._ops.append, self.page_size, policy, self._safety
        )
        return self._tier

    def attach_prefetcher(
        self, remote: RemotePages, costs: FetchCosts, options: PrefetchOptions
    ) -> Prefetcher:
        """Fetch pages into the tier's arena from now on; return the prefetcher, whose stats it keeps."""
        assert self._tier is not None, "attach the tier first"
        reach, arrivals = self._tier.reach, self._tier.arrivals
        self.costs = costs
        self._prefetcher = Prefetcher(remote, reach, arrivals, costs, self.page_size, options, self._safety)
        return self._prefetcher

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

    @property
    def has_moves(self) -> bool:
        """Tell whether the outcome of some move is still to be taken in."""
        return self._tier is not None and self._tier.has_moves

    def keyed(self, token_ids: list[int], tenant_salt: bytes) -> KeyedTokens:
        """Wrap a request's tokens for `open`. The list stays the caller's, who may append to it."""
        namespace = salted(self._namespace, tenant_salt)
        tenant = int.from_bytes(namespace[:4], "little") >> 1 if tenant_salt else 0
        return KeyedTokens(token_ids, namespace, self.page_size, tenant)

    def prefetch(self, tokens: KeyedTokens, hints: Sequence[FetchHint], now_s: float) -> Prefetch | None:
        """Have missing pages of a prompt fetched if that pays; return what its request may wait for."""
        if self._prefetcher is None:
            return None
        return self._prefetcher.begin(tokens, self._num_findable(tokens), hints, now_s)

    def settle_fetches(self, now_s: float) -> None:
        """Take in what has come of FETCHes."""
        if self._prefetcher is not None:
            self._prefetcher.settle(now_s)

    def num_missing(self, tokens: KeyedTokens) -> int:
        """Return how many tokens lie beyond the longest prefix that the device has."""
        return len(tokens.token_ids) - len(self._match(tokens)) * self.page_size

    def num_lacking(
        self, tokens: KeyedTokens, num_tokens: int, num_spare_pages: int, closing: Sequence[int] = ()
    ) -> int:
        """Return how many pages are too few to open a request of `num_tokens` and leave spare ones over.

        Its cached prefix counts as had; evictable and quiescing pages count as there, and so does what slots
        `closing` would release. 0 or less: it fits.
        """
        path = self._match(tokens)
        num_evictable = self._tree.num_unlocked - sum(not self._tree.is_locked(node) for node in path)
        num_coming = num_released([self._rows[slot] for slot in closing], kept=path)
        num_available = self._pool.num_free + self._pool.num_quiescing + num_evictable + num_coming
        return self.pages_for(num_tokens) - len(path) + num_spare_pages - num_available

    def can_load(self, tokens: KeyedTokens) -> bool:
        """Make room for all that the arena has of a prompt; False: evicted pages have to come free first."""
        if self._tier is None:
            return True
        path = self._match(tokens)
        self._tree.lock(path)
        num_pages = len(self._tier.find(self._keys(tokens)[len(path) :])[0])
        self._make_room(num_pages)
        self._tree.unlock(path, last_step=0)
        return self._pool.num_free >= num_pages

    def open(self, op: OpenSlot, tokens: KeyedTokens) -> int:
        """Open a slot on the longest cached prefix and return that prefix's length.

        At least one token is left to compute, so that there are logits to sample from. Pages of the prefix
        that lie in the arena only are loaded, as far as there are free pages for them now.
        """
        assert op.slot not in self._rows, f"slot {op.slot} is open"
        path = self._match(tokens)
        self._tree.lock(path)
        origins: Counter[Origin] = Counter({"device": len(path)})
        if self._tier is not None:
            self._tier.used(path)
            loaded = self._load(self._tier, tokens, path)
            origins.update(self._tier.arrivals.take_origin(node.key) for node in loaded)
            path += loaded
        self._rows[op.slot] = Row(tokens, [node.page for node in path], path, len(path), origins=origins)
        self._ops.append(op)
        if path:
            self._set_row(op.slot, 0, [node.page for node in path], [node.key for node in path])
        return len(path) * self.page_size

    def origins(self, slot: int) -> Counter[Origin]:
        """Return how many tokens of the prefix that the slot was opened on were found where."""
        pages = self._rows[slot].origins
        return Counter({origin: count * self.page_size for origin, count in pages.items()})

    def is_readable(self, slot: int) -> bool:
        """Tell whether the slot's prefix is there, or ordered before whatever reads it (I5)."""
        return self._rows[slot].is_readable() or not self._safety.awaits_loads

    def is_proven(self, slot: int) -> bool:
        """Tell whether every LOAD of the slot's prefix is over and was good on every rank (I7)."""
        return self._rows[slot].is_proven() or not self._safety.awaits_verdicts

    def settle(self) -> list[int]:
        """Take in what has come of moves; return the slots on pages whose load failed, to be closed at once.

        After they are closed, `drop_failed`.
        """
        if self._tier is None:
            return []
        settled = self._tier.settle()
        if settled.readable:
            pages = [node.page for node in settled.readable]
            self._ops.append(CompletePages(pages, [node.key for node in settled.readable]))
        self._log_freed()
        self._failed = settled.failed if self._safety.rolls_back else []
        if not self._failed:
            return []
        failed = set(self._failed)
        return [slot for slot, row in self._rows.items() if not failed.isdisjoint(row.path)]

    def drop_failed(self) -> None:
        """Forget the pages whose load failed, and all that continue them."""
        if not self._failed:
            return
        failed, self._failed = self._failed, []
        self._tree.drop(failed)
        self._log_freed()

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

    def reserved_len(self, slot: int) -> int:
        """Return how many tokens the slot's pages hold."""
        num_pages = len(self._rows[slot].pages) if self._safety.reservations else self.num_pages
        return num_pages * self.page_size

    def is_coming(self, slot: int, num_tokens: int, closing: Sequence[int] = ()) -> bool:
        """Tell whether reserving will succeed once slots `closing` and quiescing pages are free."""
        num_coming = self._pool.num_free + self._pool.num_quiescing
        num_coming += num_released([self._rows[slot] for slot in closing])
        if self._tier is not None:
            num_coming += self._tree.num_unlocked  # those that a move still holds
        return self.pages_for(num_tokens) - len(self._rows[slot].pages) <= num_coming

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
        own: list[Node] = []
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
                parent = row.path[-1] if row.path else None
                node = self._tree.insert(key, page, parent, row.tokens.tenant)
                row.path.append(node)
                own.append(node)
        if own_pages:
            self._ops.append(CompletePages(own_pages, list(own_keys)))
        row.num_complete = num_complete
        if self._tier is not None:
            self._tier.stored(own)

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
        ops = list(self._ops)
        self._ops.clear()
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
        return kv_stats(self._pool, self._tree)

    def held_pages(self) -> list[tuple[int, str, int, int]]:
        """Return page, state, generation and number of leases of every page that is not free."""
        return self._pool.held()

    def check(self) -> None:
        """Prove that every page is free, quiescing, or leased by exactly the rows and nodes that hold it."""
        self._pool.check()
        self._tree.check()
        busy_pages = self._tier.busy_pages if self._tier is not None else []
        check_rows(self._rows, self._pool, self._tree, busy_pages, has_paths=self._prefix_caching)

    def _match(self, tokens: KeyedTokens) -> list[Node]:
        return self._tree.match(self._keys(tokens)) if self._prefix_caching else []

    def _keys(self, tokens: KeyedTokens) -> list[PageKey]:
        return tokens.keys(0, self._num_findable(tokens))

    def _num_findable(self, tokens: KeyedTokens) -> int:
        """Return how many pages a request may find: not one that holds its last token."""
        return (len(tokens.token_ids) - 1) // self.page_size

    def _make_room(self, num_pages: int) -> None:
        while self._pool.num_free < num_pages:
            num_short = num_pages - self._pool.num_free - self._pool.num_quiescing
            may_go = None if self._tier is None else partial(self._tier.may_go, num_short=num_short)
            if not self._tree.evict(only_idle=num_short <= 0, may_go=may_go):
                break
        self._log_freed()

    def _load(self, tier: HostTier, tokens: KeyedTokens, path: list[Node]) -> list[Node]:
        """Begin to load what the arena has of a prompt beyond its locked path; return the new nodes."""
        keys, locations = tier.find(self._keys(tokens)[len(path) :])
        if not keys:
            return []
        self._make_room(len(keys))
        num_pages = tier.acquire(keys, locations, self._pool.num_free)
        if not num_pages:
            return []
        pages = self._pool.allocate(num_pages)
        self._ops.append(OwnPages(pages, self._generations(pages)))
        self._relocated()
        nodes: list[Node] = []
        for key, page in zip(keys, pages, strict=False):
            parent = nodes[-1] if nodes else path[-1] if path else None
            nodes.append(self._tree.insert(key, page, parent, tokens.tenant, is_readable=False))
        tier.load(nodes, locations[:num_pages])
        return nodes

    def _share(self, slot: int, row: Row, index: int, node: Node) -> None:
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
