"""Trees that ranks grow, each from its own part of the draft's vocabulary, are those of one, bit by bit."""

import numpy as np
import pytest
import torch

from tests.unit.tensor_parallel_group import on_ranks
from workers.engine.copies import InlineCopies
from workers.engine.sampler import greedy_tokens
from workers.engine.vocabulary_shard import VocabularyShard
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import DraftShape, with_draft
from workers.kvcache.page_table import PageTable
from workers.parallel import TPGroup
from workers.plan import SetRow
from workers.speculative.acceptance import VerifiedRows
from workers.speculative.draft_loop import DraftLoop
from workers.speculative.draft_state import DraftState
from workers.speculative.loop_inputs import LoopParts

CPU = torch.device("cpu")
NUM_SLOTS, PAGE_SIZE, PAGES_PER_ROW, DEPTHS = 4, 4, 16, 3
NUM_STATES = 199
"""Of the draft below: what it says depends on which one a path of tokens leads to."""


def make_logits(kind: str, vocab_size: int) -> torch.Tensor:
    """Return what the draft says in each of its states, [states, vocab]."""
    random = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(NUM_STATES, vocab_size, generator=random) * 2
    if kind == "narrow":  # many are equal, the two zeros as well, across the parts' borders
        logits = logits.bfloat16()
        logits[:, ::3], logits[:, 1::3] = -0.0, 0.0
    elif kind == "equal":
        logits = torch.zeros(NUM_STATES, vocab_size, dtype=torch.bfloat16)
    elif kind == "certain":  # of one token, and in a third of the states of none
        logits[:] = -torch.inf
        certain = torch.randint(0, vocab_size, (NUM_STATES, 1), generator=random)
        logits.scatter_(1, certain, 0.0)[::3] = -torch.inf
    elif kind == "no numbers":
        broken = torch.rand(NUM_STATES, vocab_size, generator=random)
        logits[broken < 0.02], logits[broken > 0.98] = torch.nan, -torch.nan
        logits[(broken > 0.5) & (broken < 0.51)] = torch.inf
        logits[::5] = torch.nan
    return logits


class PathDraft:
    """A draft whose feature is a number that its path of tokens leads to, whole on every rank; of its logits
    it has its part. Its tokens are the target's in another order."""

    feature_size = 1

    def __init__(self, logits: torch.Tensor, group: TPGroup) -> None:
        self.draft_vocab_size = logits.shape[1]
        shard = VocabularyShard(self.draft_vocab_size, group)
        self._logits = logits[:, shard.first : shard.first + shard.num_tokens]

    def forward(
        self, token_ids: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, attention: object
    ) -> torch.Tensor:
        path = features[:, 0].long() * 31 + token_ids * 7 + positions
        return (path % NUM_STATES).float()[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[hidden[:, 0].long()]

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return 3 * (self.draft_vocab_size - draft_ids)


class NoAttention:
    def begin(self) -> None:
        pass


def grow(logits: torch.Tensor, topk: int, group: TPGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft for a few rows; return their trees: tokens and fields."""
    pool = KVPool(with_draft(1, PAGE_SIZE, 1, 1, "float32", DraftShape(1, 1, 1, 1)), 65, CPU)
    table = PageTable(NUM_SLOTS, PAGES_PER_ROW, PAGE_SIZE, 65, checked=True)
    for slot in range(NUM_SLOTS):
        first = 1 + slot * PAGES_PER_ROW
        table.set_row(SetRow(slot, 0, list(range(first, first + PAGES_PER_ROW)), [], []))
    state = DraftState(pool, NUM_SLOTS, topk * DEPTHS, 3 * logits.shape[1] + 1, topk)
    parts = LoopParts(
        PathDraft(logits, group),
        state,
        pool,
        table,
        group,
        InlineCopies(),
        lambda _: NoAttention(),
        greedy_tokens,
    )
    loop = DraftLoop(NUM_SLOTS, parts)
    num_places = state.max_drafts + 1
    rows = VerifiedRows(np.arange(NUM_SLOTS), np.array([1, 5, 9, 2]), np.zeros(NUM_SLOTS, dtype=np.int64))
    features = torch.tensor([[3.0], [50.0], [111.0], [7.0]])
    at = np.repeat(np.arange(NUM_SLOTS)[:, None], num_places, axis=1)
    loop.stage(rows, torch.tensor([[2], [4], [8], [16]]), features, at)
    loop.accept()
    loop.draft(DEPTHS)
    return state.drafts[:NUM_SLOTS], state.fields[:NUM_SLOTS]


@pytest.mark.parametrize("kind", ["wide", "narrow", "equal", "certain", "no numbers"])
@pytest.mark.parametrize(
    ("vocab_size", "topk"),
    [
        (13, 4),  # the last of four ranks has one token
        (9, 8),  # no rank but a single one has as many as are followed
        (6001, 2),  # all ranks look at runs of tokens first
    ],
)
def test_every_rank_grows_the_tree_of_one(kind: str, vocab_size: int, topk: int) -> None:
    logits = make_logits(kind, vocab_size)
    # Of nine tokens on four ranks the last would have none.
    sizes = [size for size in (2, 4) if (size - 1) * -(-vocab_size // size) < vocab_size] or [3]
    token_ids, fields = grow(logits, topk, TPGroup.single())
    for size in sizes:
        for found in on_ranks(size, lambda group: grow(logits, topk, group)):
            assert torch.equal(found[0], token_ids) and torch.equal(found[1], fields)
    for tokens, (parents, depths, _) in zip(token_ids.tolist(), fields.tolist(), strict=True):
        assert max(depths) == DEPTHS and len(set(zip(parents, tokens, strict=True))) == len(tokens)
        assert depths == [1 + (depths[parent - 1] if parent else 0) for parent in parents]
        assert all(parent <= number for number, parent in enumerate(parents))


@pytest.mark.parametrize("kind", ["wide", "narrow", "equal", "certain", "no numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab_size", "num"), [(10, 3), (10, 10), (1000, 1), (1025, 2), (5000, 3), (6001, 8)]
)
def test_the_likeliest_are_those_of_a_stable_sort(
    kind: str, dtype: torch.dtype, vocab_size: int, num: int
) -> None:
    logits = make_logits(kind, vocab_size).to(dtype)

    def work(group: TPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        shard = VocabularyShard(vocab_size, group)
        return shard.likeliest(logits[:, shard.first : shard.first + shard.num_tokens], num)

    ids, log_p = work(TPGroup.single())
    # To a sort NaN is larger than any number as well.
    assert torch.equal(ids, (logits.float() + 0.0).sort(descending=True, stable=True).indices[:, :num])
    expected = (
        torch.log_softmax(logits.double(), dim=-1).gather(1, ids).nan_to_num(-torch.inf, neginf=-torch.inf)
    )
    torch.testing.assert_close(log_p, expected.float(), rtol=1e-5, atol=1e-6)
    assert (log_p <= 0).all()
    for found in on_ranks(2, work):
        assert torch.equal(found[0], ids) and torch.equal(found[1], log_p)
