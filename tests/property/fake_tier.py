"""FakeTier: the arena, the moves and the bad luck of a FakeGroup, a little further each time it is asked."""

from dataclasses import dataclass, field
from random import Random

from cache_service.keys import PageKey
from tests.property.fake_arena import FakeArena, FakeClient
from tests.property.fake_mover import FakeMover, Faults
from tests.property.fake_ranks import FakeRank
from tests.property.fake_sources import PAGE_BYTES, FakeSources, SourceOptions
from workers.kvcache.fetch_costs import FetchCosts
from workers.kvcache.host_tier import WritePolicy
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.prefetcher import PrefetchOptions
from workers.move_board import MoveBoard
from workers.plan import BatchPlan, SavePages


@dataclass(frozen=True)
class TierOptions:
    """`speeds`: how far each rank's moves go each time; `news_ratio`: how often messages and news pass."""

    num_slots: int = 6
    policy: WritePolicy = "write_through"
    capacity: int = 64
    speeds: tuple[float, ...] = (1.0, 1.0)
    news_ratio: float = 1.0
    upset_ratio: float = 0.0
    """How often the arena evicts, loses a bit, gets a page from another replica; now and then it restarts."""
    faults: Faults = field(default_factory=Faults)
    sources: SourceOptions = field(default_factory=SourceOptions)
    board: type[MoveBoard] = MoveBoard
    seed: int = 0


class FakeTier:
    """Attaches a manager and its ranks to one arena."""

    def __init__(self, options: TierOptions, cache: KVCacheManager, ranks: list[FakeRank]) -> None:
        self.options = options
        self.chance = Random(options.seed)
        self.arena = FakeArena(options.num_slots, len(ranks), self.chance)
        words = bytearray(8 * len(ranks) * options.capacity)
        boards = [options.board(rank, len(ranks), words, options.capacity) for rank in range(len(ranks))]
        self.client = FakeClient(self.arena, boards[0], self.chance)
        self.movers = [
            FakeMover(part, rank, self.arena, boards[part], options.faults, self.chance)
            for part, rank in enumerate(ranks)
        ]
        for rank, mover in zip(ranks, self.movers, strict=True):
            rank.attach(mover)
        self.stats = cache.attach_tier(self.client, boards[0], options.policy).stats
        self.sources = FakeSources(
            self.arena, options.sources, self.chance, cache.page_size, [rank.contents_of for rank in ranks]
        )
        self.prefetcher = cache.attach_prefetcher(
            self.sources,
            FetchCosts(PAGE_BYTES, cache.page_size, options.sources.guesses),
            PrefetchOptions(options.sources.policy, options.sources.timeout_s),
        )
        self._is_hurried = False
        self._num_lost = 0
        self._num_removed = 0
        self._num_failed_loads = 0

    def tell(self, keys: list[PageKey], text: list[int], page_size: int) -> None:
        """Note what the pages of a text have to hold."""
        for index, key in enumerate(keys):
            self.arena.truth[key] = tuple(text[index * page_size : (index + 1) * page_size])
            self.arena.parents[key] = keys[index - 1] if index else None

    def note(self, plan: BatchPlan) -> None:
        for op in plan.ops:
            if isinstance(op, SavePages):
                self.client.note(op)

    @property
    def is_quiet(self) -> bool:
        return self.client.is_quiet and not self.prefetcher.num_pages_in_flight

    def move_on(self) -> None:
        for mover, speed in zip(self.movers, self.options.speeds, strict=False):
            mover.advance(1.0 if self._is_hurried else speed)
        if self._is_hurried or self.chance.random() < self.options.news_ratio:
            self.client.deliver(100 if self._is_hurried else self.chance.randrange(4))
        self.sources.move_on()
        if not self._is_hurried and self.chance.random() < self.options.upset_ratio:
            self.upset()

    def upset(self) -> None:
        actions = [self.arena.evict, self.arena.corrupt, self.arena.bring_back, self.client.restart_server]
        self.chance.choices(actions, (4, 2, 3, 1))[0]()

    def speed_up(self) -> None:
        """From now on all goes at once, and the arena is left in peace."""
        self._is_hurried = self.sources.is_hurried = True

    def check_losses(self, removed: list[bytes]) -> None:
        """A page leaves the device once it is in the arena, as a loss, or because it was never good (I11)."""
        num_lost = self.stats.num_lost_pages - self._num_lost
        num_failed_loads = self.stats.failed_loads.total() - self._num_failed_loads
        self._num_lost, self._num_failed_loads = self.stats.num_lost_pages, self.stats.failed_loads.total()
        self._num_removed += len(removed)  # some are known to be lost only later
        assert self._num_lost <= self._num_removed, (
            f"loss: {self._num_lost} pages are lost, {self._num_removed} left the device"
        )
        num_saving = sum(map(self.client.is_saving, removed))
        assert not num_saving or num_failed_loads, f"evict: {num_saving} pages left the device in their SAVE"
        unsaved = [key for key in map(PageKey, removed) if not self._was_saved(key)]
        assert len(unsaved) <= num_lost or num_failed_loads, (
            f"loss: {len(unsaved)} pages left the device unsaved, {num_lost} are counted"
        )

    def check_idle(self) -> None:
        """Nothing is held once nothing moves."""
        assert not self.prefetcher.num_pages_in_flight, "a FETCH is never over"
        assert all(not mover.num_in_flight for mover in self.movers), "a move is not over"
        assert not self.arena.leases.total(), f"a slot stays leased: {+self.arena.leases}"
        assert self.arena.writing == {grant.slot for grant in self.client.grants}, "a grant leaked"

    def _was_saved(self, key: PageKey) -> bool:
        return key in self.client.was_saved or key in self.arena.gone or key in self.arena.index
