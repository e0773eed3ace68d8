"""A capture that fails on one rank: all ranks give the pass up, and none is left in another's collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.unit.tensor_parallel_group import on_ranks
from workers.engine.copies import InlineCopies
from workers.engine.cuda_graphs import Agree, require_all
from workers.engine.graph_guard import Bucket, GraphGuard
from workers.engine.graph_runner import GraphRunner, failed_anywhere
from workers.engine.model_runner import ModelRunner
from workers.engine.part_times import part_times_of
from workers.engine.sampler import greedy_tokens
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import DraftShape, target_only, with_draft
from workers.kvcache.page_table import PageTable
from workers.parallel import TPGroup
from workers.speculative.draft_runner import DraftRunner
from workers.speculative.draft_state import DraftState
from workers.speculative.loop_inputs import LoopParts

CPU = torch.device("cpu")
PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, NUM_SLOTS = 4, 4, 30, 6
SIZES = (1, 2, 4)


class FailingGraphs:
    """Passes that are captured in name only: a replay computes. The captures `failing` fail."""

    def __init__(self, agree: Agree, failing: tuple[int, ...] = ()) -> None:
        self.agree, self.failing = agree, failing
        self.num_captures = 0

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        compute()
        number, self.num_captures = self.num_captures, self.num_captures + 1
        require_all(self.agree, RuntimeError("no capture") if number in self.failing else None)

        def replay() -> None:
            compute()

        return replay

    @contextmanager
    def capturing(self) -> Iterator[None]:
        yield

    def used_bytes(self) -> int:
        return 0


class SummingModel:
    """Logits that are sums over the ranks, of as many rows as the batch has."""

    def __init__(self, group: TPGroup, failing_size: int | None = None) -> None:
        self.group, self.failing_size = group, failing_size

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        if token_ids.shape[0] == self.failing_size:
            raise RuntimeError("no such kernel")
        hidden = torch.stack([token_ids, positions], dim=1).float() + 1.0
        self.group.all_reduce(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        return hidden if self.group.rank == 0 else None


class NoAttention:
    captured_modes: frozenset[str] = frozenset()

    def plan(self, batch: object) -> None:
        pass

    def begin(self) -> None:
        pass


def runner_of(group: TPGroup, graphs: FailingGraphs, model: SummingModel) -> GraphRunner:
    pool = KVPool(target_only(1, PAGE_SIZE, 1, 8, "float32"), NUM_PAGES, CPU)
    buckets = [Bucket("decode", size) for size in SIZES]
    runner = ModelRunner(model, NoAttention(), pool)
    return GraphRunner(runner, buckets, PAGES_PER_ROW, NUM_SLOTS, CPU, group=group, graphs=graphs)


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 2)])
def test_what_one_rank_cannot_capture_none_replays(failing: tuple[int, ...]) -> None:
    def work(group: TPGroup) -> tuple[list[Bucket], list[Bucket], float]:
        graphs = FailingGraphs(group.agree, failing if group.rank == 1 else ())
        runner = runner_of(group, graphs, SummingModel(group))
        failed = runner.capture()
        everywhere = failed_anywhere([Bucket("decode", size) for size in SIZES], failed, group, CPU)
        total = torch.ones(1)
        group.all_reduce(total)  # nothing is left over in the ranks' collectives
        return failed, everywhere, total.item()

    largest_first = sorted(SIZES, reverse=True)
    expected = [Bucket("decode", largest_first[number]) for number in failing]
    for failed, everywhere, total in on_ranks(2, work):
        assert failed == expected
        assert sorted(everywhere, key=str) == sorted(expected, key=str)
        assert total == 2.0


class SummingDraft:
    """A draft whose every pass is a sum over the ranks, which have their parts of its vocabulary."""

    draft_vocab_size, feature_size = 40, 3

    def __init__(self, group: TPGroup) -> None:
        self.group = group

    def forward(
        self, token_ids: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, attention: object
    ) -> torch.Tensor:
        hidden = torch.stack([token_ids, positions, features.sum(1).long()], dim=1).float() + 1.0
        self.group.all_reduce(hidden)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        best = hidden.sum(1).long() % self.draft_vocab_size - self.group.rank * 20
        return torch.nn.functional.one_hot(best.clamp(-1, 20) + 1, 22)[:, 1:21].float()

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize(
    ("failing", "failed"), [((0,), {NUM_SLOTS}), ((2,), {NUM_SLOTS}), ((3,), {2}), ((1, 4), {2, NUM_SLOTS})]
)
@pytest.mark.parametrize("topk", [1, 2])
def test_drafting_that_one_rank_cannot_capture_none_replays(
    failing: tuple[int, ...], failed: set[int], topk: int
) -> None:
    """A size takes three captures: of accepting, and of drafting one token and three."""

    def work(group: TPGroup) -> tuple[list[tuple[int, int]], list[list[int]], float]:
        layout = with_draft(1, PAGE_SIZE, 1, 1, "float32", DraftShape(1, 1, 1, SummingDraft.feature_size))
        pool = KVPool(layout, NUM_PAGES, CPU)
        table = PageTable(NUM_SLOTS, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
        state = DraftState(pool, NUM_SLOTS, 3 * topk, 40, topk)
        parts = LoopParts(
            SummingDraft(group),
            state,
            pool,
            table,
            group,
            InlineCopies(),
            lambda _: NoAttention(),
            greedy_tokens,
        )
        graphs = FailingGraphs(group.agree, failing if group.rank == 1 else ())
        guard, times = GraphGuard((1,), True, True), part_times_of(CPU)
        runner = DraftRunner(parts, (2, NUM_SLOTS), (1, 3), guard, times, None, None, graphs)
        runner.prepare()
        total = torch.ones(1)
        group.all_reduce(total)  # nothing is left over in the ranks' collectives
        return sorted(runner._prepared), state.drafts.tolist(), total.item()

    first, second = on_ranks(2, work)
    assert first[0] == [(size, num) for size in (2, NUM_SLOTS) if size not in failed for num in (0, 1, 3)]
    assert first == second and first[2] == 2.0


def test_a_rank_that_fails_in_the_pass_itself_does_not_go_on_alone() -> None:
    """The other waits in its collective: neither may take the next bucket's for this one's."""

    def work(group: TPGroup) -> str:
        model = SummingModel(group, failing_size=2 if group.rank == 1 else None)
        try:
            runner_of(group, FailingGraphs(group.agree), model).capture()
        except Exception as error:
            group.close()
            return type(error).__name__
        return "went on"

    assert on_ranks(2, work) == ["TPPeerLostError", "RuntimeError"]
