"""Placement: where one checkpoint tensor's values go in one rank's parameter.

Layers make placements, the weight loader carries them out. A parameter starts as zeros; what no run covers
(a zero head, rows added to make shards equal) stays zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """parameter[target : target + length] = checkpoint[source : source + length], along one dimension."""

    target: int
    source: int
    length: int


@dataclass(frozen=True)
class Placement:
    """`parameter`'s share of a checkpoint tensor of `shape`; `columns` None: all of them, or a vector."""

    parameter: torch.Tensor
    shape: tuple[int, ...]
    rows: tuple[Run, ...]
    columns: tuple[Run, ...] | None = None


def whole(parameter: torch.Tensor) -> Placement:
    """Return the placement of a tensor every rank holds in full."""
    shape = tuple(parameter.shape)
    return Placement(parameter, shape, (Run(0, 0, shape[0]),))


def shard_run(length: int, rank: int, share: int) -> tuple[Run, ...]:
    """Return rank's run of `share` of `length` entries; shorter or empty where the entries end."""
    first = min(rank * share, length)
    count = min(share, length - first)
    return (Run(0, first, count),) if count else ()


def head_runs(heads: Sequence[int | None], head_dim: int, first: int = 0) -> tuple[Run, ...]:
    """Return one run per real head: local head i lies at `first + i * head_dim`."""
    return tuple(
        Run(first + place * head_dim, head * head_dim, head_dim)
        for place, head in enumerate(heads)
        if head is not None
    )
