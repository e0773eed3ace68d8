"""The nucleus found by search is that found by sorting, of one rank and of several."""

import pytest
import torch

from tests.unit.tensor_parallel_group import on_ranks
from workers.engine.nucleus import nucleus
from workers.engine.vocabulary_shard import VocabularyShard
from workers.parallel import TPGroup

ROWS, VOCAB_SIZE = 6, 700


def make_values(kind: str, seed: int) -> torch.Tensor:
    values = torch.randn(ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "narrow":  # many are equal, the two zeros as well
        values = values.bfloat16().float()
        values[:, ::7] = -0.0
        values[:, 1::7] = 0.0
    elif kind == "equal":
        values = torch.zeros(ROWS, VOCAB_SIZE)
    elif kind == "banned":
        values[:, 100:600] = -torch.inf
    return values


def by_sorting(values: torch.Tensor, masses: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    order = (values + 0.0).sort(dim=1, descending=True, stable=True).indices
    sorted_masses = masses.gather(1, order)
    is_kept = (sorted_masses.cumsum(1) - sorted_masses).double() < target
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, is_kept)


@pytest.mark.parametrize("kind", ["wide", "narrow", "equal", "banned"])
@pytest.mark.parametrize("share", [1e-9, 0.3, 0.9, 0.999999])
def test_what_is_searched_is_what_sorting_finds(kind: str, share: float) -> None:
    values = make_values(kind, 5)
    masses = (values.double().exp() * 2**30).to(torch.int64)
    target = (
        masses.sum(1, keepdim=True) * torch.linspace(share, share / 2, ROWS, dtype=torch.float64)[:, None]
    )

    def work(group: TPGroup) -> torch.Tensor:
        shard = VocabularyShard(VOCAB_SIZE, group)
        part = slice(shard.first, shard.first + shard.num_tokens)
        return nucleus(values[:, part], masses[:, part], target, shard)

    expected = by_sorting(values, masses, target)
    assert expected.any(dim=1).all() and torch.equal(work(TPGroup.single()), expected)
    assert torch.equal(torch.cat(on_ranks(3, work), dim=1), expected)
