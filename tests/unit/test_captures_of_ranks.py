"""A capture that fails on one rank: all ranks give the pass up, and none is left in another's collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.unit.tensor_parallel_group import on_ranks
from workers.engine.cuda_graphs import Agree, require_all
from workers.engine.graph_guard import Bucket
from workers.engine.graph_runner import GraphRunner, failed_anywhere
from workers.engine.model_runner import ModelRunner
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.parallel import TPGroup

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
