"""HostTier: decides which pages of a replica are saved to the node's arena and loaded from it.

Owned by the KVCacheManager in rank 0's step loop thread. It numbers the moves and writes them into the
group's log (I1); the ranks' PageMovers carry them out; what came of them is read from the MoveBoard and never
waited for (I2). No torch, no sockets, no clock.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from cache_service.keys import PageKey
from cache_service.page_records import Entry, Grant, Location
from workers.kvcache.arrivals import Arrivals
from workers.kvcache.host_cache import HostCache, MoveStatuses
from workers.kvcache.page_pool import PagePool, Safety
from workers.kvcache.prefetcher import Reach
from workers.kvcache.radix_cache import Node, RadixCache
from workers.kvcache.tier_moves import Load, Save, Settled
from workers.kvcache.tier_stats import TierStats
from workers.kvcache.waiting_saves import WaitingSaves, unsaved_chain
from workers.move_board import MoveStatus
from workers.plan import LoadPages, PlanOp, SavePages

WritePolicy = Literal["write_through", "write_through_selective", "write_back"]
"""When a page is saved: once it is complete, or if that failed once it is used again; once it is used again;
once it would be evicted."""

DISTRUST_STEPS = 1_000
"""A place whose load failed is not tried again for so many steps; by then the arena has dropped the page, if
that was why."""

GRANT_STEPS = 128
"""So many steps evictions under `write_back`, and a replica at rest, wait for grants that do not come."""


class HostTier:
    """One replica's side of its node's arena. `log` takes ops for the plan that is made next."""

    def __init__(
        self,
        host: HostCache,
        moves: MoveStatuses,
        pool: PagePool,
        tree: RadixCache,
        log: Callable[[PlanOp], None],
        page_size: int,
        policy: WritePolicy = "write_through",
        safety: Safety | None = None,
    ) -> None:
        self._host = host
        self._moves = moves
        self._pool = pool
        self._tree = tree
        self._log = log
        self._page_size = page_size
        self._policy = policy
        self._safety = safety or Safety()
        self._num_moves = 0
        self._num_leaving = 0
        self._waiting = WaitingSaves()
        self._patience = GRANT_STEPS
        """Steps left in which something waits for grants; a page that got one renews it."""
        self._saves: deque[Save] = deque()  # by move: committed in this order, parents before children
        self._loads: deque[Load] = deque()
        self._num_settled = 0
        self._distrusted: OrderedDict[Location, int] = OrderedDict()  # until `_num_settled` is so many
        self._unproven: set[PageKey] = set()  # left the device while nobody knew that the arena has them
        self.stats = TierStats()
        self.arrivals = Arrivals()
        """What FETCHes have brought, as the Prefetcher tells."""

    @property
    def num_saves_in_flight(self) -> int:
        """SAVEs that some rank may still be at."""
        return len(self._saves)

    @property
    def num_loads_in_flight(self) -> int:
        """LOADs that some rank may still be at."""
        return len(self._loads)

    @property
    def has_moves(self) -> bool:
        """Tell whether the outcome of some move, or a grant for a page, is to be expected soon."""
        return bool(self._saves or self._loads or (self._waiting and self._patience))

    @property
    def busy_pages(self) -> list[int]:
        """Pages leased by moves, one entry a lease."""
        return [save.node.page for save in self._saves] + [load.node.page for load in self._loads]

    def reach(self, keys: Sequence[PageKey]) -> Reach:
        """Return how many leading pages of a prompt are on the device or in the arena, as far as is known."""
        num_stored = 0
        for key in keys:
            node = self._tree.find(key)
            if not (node is not None and node.is_saved) and self._place(key) is None:
                break
            num_stored += 1
        return Reach(max(num_stored, len(self._tree.match(keys))), num_stored)

    def find(self, keys: Iterable[PageKey]) -> tuple[list[PageKey], list[Location]]:
        """Return the leading keys whose pages are thought to be in the arena, and where."""
        found: tuple[list[PageKey], list[Location]] = ([], [])
        for key in keys:
            location = self._place(key)
            if location is None:
                break
            found[0].append(key)
            found[1].append(location)
        return found

    def acquire(self, keys: list[PageKey], locations: list[Location], max_pages: int) -> int:
        """Lease the slots of a prefix of what `find` found, at most `max_pages`; return how many."""
        num = min(len(keys), max_pages, self._room())
        num_leased = self._host.acquire(keys[:num], locations[:num]) if num > 0 else 0
        self.arrivals.forget(keys[num_leased:num])
        return num_leased

    def load(self, nodes: Sequence[Node], locations: Sequence[Location]) -> None:
        """Fill the pages of fresh, unreadable nodes from slots that `acquire` leased."""
        first = self._num_moves + 1
        for node, location in zip(nodes, locations, strict=True):
            self._num_moves += 1
            if self._safety.load_leases:
                self._pool.lease(node.page)
            node.is_busy = node.is_saved = True
            self._loads.append(Load(self._num_moves, node, location))
        self._log(
            LoadPages(
                first,
                [node.page for node in nodes],
                [location.slot for location in locations],
                [location.epoch for location in locations],
                [node.key for node in nodes],
            )
        )

    def stored(self, nodes: Sequence[Node]) -> None:
        """Note complete pages that are new in the tree, parents first."""
        if self._policy == "write_through":
            self._save(nodes)

    def used(self, path: Sequence[Node]) -> None:
        """Note that a request goes on from pages that were there: those the arena lacks it may take now.

        Else nothing that continues them could ever be saved.
        """
        if self._policy != "write_back":
            self._save([node for node in path if node.is_readable and not node.is_saved])
        if path and self._is_there(path[-1]):
            self._host.touch([node.key for node in path])

    def may_go(self, node: Node, num_short: int) -> bool:
        """Tell whether the device may evict an idle leaf now, while it is so many pages short.

        Under `write_back` its page is saved first, unless enough others are on their way already. Where the
        arena grants nothing for too long, it goes unsaved.
        """
        if self._is_there(node):
            self._waiting.remove(node)
            if self._locate(node.key) is None:
                self._unproven.add(node.key)
            return True
        if self._policy == "write_back":
            num_waiting = self._waiting.num_leaving if self._patience else 0
            if node not in self._waiting:
                if self._num_leaving + num_waiting >= num_short:
                    return False
                last = self._save(unsaved_chain(node))
                if last is not None and last.node is node:
                    last.is_leaving = True
                    self._num_leaving += 1
                    return False
            if node in self._waiting and self._patience:
                self._waiting.leave(node)
                return False
        self._skip(node)
        self._count_loss()
        return True

    def settle(self) -> Settled:
        """Read what has come of the moves, give back what they held and tell of the loads."""
        self._num_settled += 1
        while self._distrusted and next(iter(self._distrusted.values())) <= self._num_settled:
            self._distrusted.popitem(last=False)
        self._settle_lost()
        self._settle_saves()
        settled = self._settle_loads()
        if self._waiting:
            self._patience = max(0, self._patience - 1)
            self._save(self._grantable())
        return settled

    def _room(self) -> int:
        """Return how many more moves may begin: the board holds the words of the last `capacity`."""
        oldest = min(
            self._saves[0].move if self._saves else self._num_moves + 1,
            self._loads[0].move if self._loads else self._num_moves + 1,
        )
        return self._moves.capacity - (self._num_moves + 1 - oldest)

    def _save(self, nodes: Iterable[Node]) -> Save | None:
        """Begin to save pages, parents first, unless they are saved, on their way, or cannot be.

        Return the last that began.
        """
        first = self._num_moves + 1
        begun = [save for node in nodes if (save := self._begin_save(node)) is not None]
        if begun:
            self._log(
                SavePages(
                    first,
                    [save.node.page for save in begun],
                    [save.grant.slot for save in begun],
                    [save.grant.epoch for save in begun],
                    [save.node.key for save in begun],
                )
            )
        return begun[-1] if begun else None

    def _grantable(self) -> Iterator[Node]:
        """Yield pages that wait, each once at most, until one has to wait on."""
        if len(self._waiting) > self._tree.num_pages:
            for node in self._waiting.nodes():
                if self._tree.find(node.key) is not node:
                    self._skip(node)
        for _ in range(len(self._waiting)):
            node = self._waiting.first
            if self._tree.find(node.key) is not node:  # dropped: what it continued was not good
                self._skip(node)
                continue
            yield node
            if self._waiting and self._waiting.first is node:
                return

    def _begin_save(self, node: Node) -> Save | None:
        if node.is_saved or node.is_busy or node.was_tried:
            return None
        if self._is_there(node):
            node.is_saved = True  # another replica saved it, or this one before it was evicted
            self._waiting.remove(node)
            return None
        parent = node.parent
        if parent is not None and not (parent.is_busy or self._is_there(parent)):
            if parent in self._waiting:
                self._waiting.add_behind(node, parent)
                return None
            self._waiting.remove(node)
            self.stats.skipped_saves["no_parent"] += 1
            return None
        grant = self._host.take_grant() if self._room() > 0 else None
        if grant is None:
            self._waiting.add(node, "no_grant" if self._room() > 0 else "busy")
            return None
        is_leaving = self._waiting.remove(node)
        self._num_leaving += is_leaving
        self._num_moves += 1
        if self._safety.save_leases:
            self._pool.lease(node.page)
        node.is_busy = node.was_tried = True
        save = Save(self._num_moves, node, grant, is_leaving)
        self._saves.append(save)
        return save

    def _skip(self, node: Node) -> None:
        """Count a page that leaves the device and waited in vain, if it waited."""
        if node in self._waiting:
            self.stats.skipped_saves[self._waiting.reason(node)] += 1
            self._waiting.remove(node)

    def _is_there(self, node: Node) -> bool:
        """Tell whether, as far as is known, the arena has a node's page. It takes none without its parent."""
        return node.is_saved or self._locate(node.key) is not None

    def _locate(self, key: PageKey) -> Location | None:
        location = self._host.locate(key)
        return None if location in self._distrusted else location

    def _place(self, key: PageKey) -> Location | None:
        """Return where to look for a page: what a FETCH said may be newer than the arena's own news."""
        location = self._locate(key) or self.arrivals.location(key)
        return None if location in self._distrusted else location

    def _settle_lost(self) -> None:
        lost = self._host.take_lost()
        self.arrivals.forget(lost)
        for key in lost:
            node = self._tree.find(key)
            if node is not None:
                node.is_saved = False
            elif key in self._unproven:  # its commit was under way when it went, and came to nothing
                self._unproven.remove(key)
                self._count_loss()
        if self._unproven:
            self._unproven = {
                key
                for key in self._unproven
                if self._host.locate(key) is None and self._tree.find(key) is None
            }

    def _count_loss(self) -> None:
        self.stats.num_lost_pages += self._safety.counts_losses

    def _settle_saves(self) -> None:
        entries: list[Entry] = []
        failed: list[Grant] = []
        if not self._safety.commits_in_order:
            self._saves = deque(sorted(self._saves, key=lambda save: not self._moves.is_over(save.move)))
        while self._saves and self._moves.is_over(self._saves[0].move):
            save = self._saves.popleft()
            node, status = save.node, self._moves.status(save.move)
            parent = node.parent
            self._num_leaving -= save.is_leaving
            self._let_go(node, is_leased=self._safety.save_leases)
            is_orphan = parent is not None and not self._is_there(parent)
            if status.is_failed or is_orphan:
                failed.append(save.grant)
                self.stats.failed_saves[reason_of(status) if status.is_failed else "no_parent"] += 1
                continue
            node.is_saved = True
            self.stats.num_saved_pages += 1
            if save.is_leaving or self._policy != "write_back":
                self._patience = GRANT_STEPS
            parent_key = None if parent is None else parent.key
            entries.append(
                Entry(save.grant.slot, save.grant.epoch, node.key, parent_key, self._page_size, node.tenant)
            )
        if entries:
            self._host.commit(entries)
        if failed:
            self._host.abort(failed)

    def _settle_loads(self) -> Settled:
        settled = Settled()
        still: deque[Load] = deque()
        over: list[Load] = []
        for load in self._loads:
            is_over = self._moves.is_over(load.move)  # first: what it has come to by then is final
            status = self._moves.status(load.move)
            if status.is_failed:
                if load.outcome != "failed":
                    self._fail(load, status)
                    settled.failed.append(load.node)
            elif status >= MoveStatus.ENQUEUED and load.outcome == "unknown":
                load.outcome = "readable"
                load.node.is_readable = True
                settled.readable.append(load.node)
            (over if is_over else still).append(load)
        self._loads = still
        for load in over:
            self._let_go(load.node, is_leased=self._safety.load_leases)
            load.node.is_proven = load.outcome == "readable"
            self.stats.num_loaded_pages += load.node.is_proven
        if over:
            self._host.release([load.location.slot for load in over])
        return settled

    def _fail(self, load: Load, status: MoveStatus) -> None:
        load.outcome = "failed"
        load.node.is_saved = False
        self.stats.failed_loads[reason_of(status)] += 1
        self._distrusted[load.location] = self._num_settled + DISTRUST_STEPS
        if status is MoveStatus.FAILED_CORRUPT:
            self._host.report_corrupt(load.location)

    def _let_go(self, node: Node, *, is_leased: bool) -> None:
        node.is_busy = False
        if is_leased:
            self._pool.release(node.page)  # forward passes that read it are fenced by their own leases


def reason_of(status: MoveStatus) -> str:
    """Return the word under which a failure is counted."""
    return status.name.removeprefix("FAILED_").lower()
