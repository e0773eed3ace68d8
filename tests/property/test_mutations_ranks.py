"""Ranks that decide by themselves, and a rank 0 that does not wait for the others, are noticed.

The mechanisms are how a group works, so there is no switch: here stand ranks and boards that lack them.
"""

from itertools import count

import pytest

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.fake_ranks import FakeRank, next_token
from tests.property.random_tier import live
from tests.property.stored_group import TEXT, advance, stored_group
from workers.completion_board import CompletionBoard
from workers.config import WorkerConfig
from workers.kvcache.page_pool import Safety
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import BatchPlan, FreePages
from workers.protocol import SamplingParams

SEEDS = range(3000, 3040)
NUM_PAGES = 9


class SparingRank(FakeRank):
    """Frees pages only once its own memory runs short."""

    def free(self, op: FreePages) -> None:
        if len(self.pages) == NUM_PAGES:
            super().free(op)


class TrustingRank(SparingRank):
    """And does not look at the plan's relocation version."""

    def check_version(self, plan: BatchPlan) -> None:
        pass


class ImpatientRank(FakeRank):
    """Asks its own mover, as `event.query()` would, and samples without the pages that are not loaded yet."""

    def wait_for_loads(self, plan: BatchPlan) -> None:
        moves = {slot: [self.mover.move_of(page) for page in self.rows[slot]] for slot in plan.slots}
        self.late = {
            slot for slot, found in moves.items() if any(move and move.kind == "load" for move in found)
        }

    def sample(self, slot: int, context_len: int) -> int:
        if slot in self.late:
            return next_token([], self.slots[slot].seed, self.vocab_size)
        return super().sample(slot, context_len)


class OwnSteps(CompletionBoard):
    """Rank 0 takes a step for complete once it is complete on rank 0."""

    def minimum(self) -> int:
        return self.counts()[0]


class OwnMoves(MoveBoard):
    """Rank 0 takes a move for over once it is over on rank 0."""

    def status(self, move: int) -> MoveStatus:
        return self.own_status(move)

    def is_over(self, move: int) -> bool:
        return self.own_status(move).is_over


def follower(make: type[FakeRank]):
    """Make plain ranks, but rank 1 of another kind."""
    numbers = count()

    def make_rank(config: WorkerConfig, max_context_len: int, incarnation: int) -> FakeRank:
        if next(numbers) == 0:
            return plain_rank(config, max_context_len, incarnation)
        return make(config.num_pages, config.page_size, 61, incarnation)

    return make_rank


def free_pages_at_the_end(rank: type[FakeRank]) -> None:
    group = FakeGroup(num_pages=NUM_PAGES, num_ranks=2, prefix_caching=False, make_rank=follower(rank))
    group.submit([1] * 6, SamplingParams(max_tokens=4, ignore_eos=True))
    group.run()
    group.settle()


def lag(board: type[CompletionBoard]) -> None:
    """Two ranks, the second of which lags, in a pool too small for all."""
    group = FakeGroup(num_pages=NUM_PAGES, page_size=2, max_context_len=16, num_ranks=2, board=board)
    for number in range(6):
        group.submit([1, 1, 1, number, 1], SamplingParams(max_tokens=14 - 2 * number, ignore_eos=True))
        group.step(lags=(0, 2))
    for _ in range(40):
        group.step(lags=(0, 2))
    group.run()
    group.settle()
    assert group.cache.stats().num_evictions > 0


def live_with(move_board: type[MoveBoard]) -> None:
    for seed in SEEDS:
        live(seed, num_ranks=2, move_board=move_board, make_rank=plain_rank)


def read_while_copies_run(rank: type[FakeRank]) -> None:
    """A step reads two pages whose LOADs are enqueued on both ranks, and over on none."""
    group = stored_group(2, Safety(), follower(rank), num_ranks=2)
    group.submit(TEXT[:5], SamplingParams(max_tokens=1))
    group.step()
    advance(group, 0, 1)
    assert all(mover.num_in_flight == 2 for mover in group.tier.movers)
    group.step()
    assert not group.unfinished
    group.end()


def test_with_one_decider_that_waits_for_all_no_check_fires() -> None:
    free_pages_at_the_end(FakeRank)
    lag(CompletionBoard)
    live_with(MoveBoard)
    read_while_copies_run(FakeRank)


@pytest.mark.parametrize(
    ("rank", "check"),
    [
        (SparingRank, "version: the rank's log differs from the plan's"),
        (TrustingRank, "ranks differ"),
    ],
)
def test_a_rank_that_frees_by_its_own_memory_is_noticed(rank, check) -> None:
    with pytest.raises(AssertionError, match=check):
        free_pages_at_the_end(rank)


def test_a_rank_that_reads_by_its_own_loads_is_noticed() -> None:
    with pytest.raises(AssertionError, match="ranks differ"):
        read_while_copies_run(ImpatientRank)


def test_pages_freed_by_rank_0_s_own_steps_are_noticed() -> None:
    with pytest.raises(AssertionError, match=r"fence: page \d+ is freed while step \[.*\] may touch it"):
        lag(OwnSteps)


def test_pages_used_and_freed_by_rank_0_s_own_moves_are_noticed() -> None:
    with pytest.raises(AssertionError, match=r"complete: page \d+, whose LOAD is (PENDING|FAILED)"):
        live_with(OwnMoves)
