"""Mover: what an Engine, its sanitizer and its rank ask of what moves pages, and the choice of one."""

from collections.abc import Callable, Iterable
from typing import Protocol

from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.arena_part import MappedArena, VerifyPolicy
from workers.kvcache.cuda_copies import CudaPinning, CudaStreams, batch_copy
from workers.kvcache.cuda_page_mover import CudaPageMover
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.move_shadow import MoveWitness
from workers.kvcache.moves import MoveInjection, MoveStats
from workers.kvcache.page_mover import PageMover
from workers.move_board import MoveBoard
from workers.plan import LoadPages, SavePages


class Mover(MoveWitness, Protocol):
    """SAVEs and LOADs of one rank. PageMover says what each does."""

    @property
    def stats(self) -> MoveStats:
        """What moves came to."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Moves that were started and are not over."""
        ...

    def start(self, op: SavePages | LoadPages) -> None:
        """Begin an op's moves. Never blocks."""

    def loading_pages(self) -> list[int]:
        """Return the pages of LOADs in flight."""
        ...

    def wait_for(self, pages: Iterable[int]) -> bool:
        """Let what is computed next come after the LOADs in flight of `pages`; True if any is (I5)."""
        ...

    def close(self) -> None:
        """End all moves."""


def mover_for(
    pool: KVPool,
    mapped: Callable[[], MappedArena | None],
    part: int,
    board: MoveBoard,
    *,
    verify: VerifyPolicy = "always",
    mechanisms: Mechanisms = ALL_ON,
    injection: MoveInjection | None = None,
) -> Mover:
    """Return the mover of a pool's device. Raises MoverError where the arena does not fit."""
    if pool.data.device.type == "cpu":
        return PageMover(pool, mapped, part, board, verify=verify, mechanisms=mechanisms, injection=injection)
    return CudaPageMover(
        pool,
        mapped,
        part,
        board,
        streams=CudaStreams(pool, batch_copy()),
        pinning=CudaPinning(),
        verify=verify,
        mechanisms=mechanisms,
        injection=injection,
    )
