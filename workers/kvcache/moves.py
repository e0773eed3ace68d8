"""Moves: single copies of a page between KVPool and arena, what is counted of them, and what tests inject.

Made by PageMover from a plan's SavePages and LoadPages. No torch.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple

from cache_service.keys import PageKey
from workers.move_board import MoveStatus
from workers.plan import LoadPages, SavePages

MoveKind = Literal["save", "load"]
_KINDS: tuple[MoveKind, ...] = ("save", "load")


class Move(NamedTuple):
    """One entry of a SavePages or LoadPages: `number` counts in the group's log, from 1."""

    number: int
    kind: MoveKind
    page: int
    slot: int
    epoch: int
    key: PageKey


def moves_of(op: SavePages | LoadPages) -> list[Move]:
    """Return an op's entries, in order."""
    kind: MoveKind = "save" if isinstance(op, SavePages) else "load"
    entries = zip(op.pages, op.slots, op.epochs, op.keys, strict=True)
    return [
        Move(op.first_move + place, kind, page, slot, epoch, PageKey(key))
        for place, (page, slot, epoch, key) in enumerate(entries)
    ]


@dataclass
class MoveStats:
    """What one rank's moves came to. The mover's threads write it, scrapes read it: no key is ever added."""

    counts: Counter[tuple[MoveKind, MoveStatus]] = field(
        default_factory=lambda: Counter(
            {(kind, status): 0 for kind in _KINDS for status in MoveStatus if status.is_over}
        )
    )
    """Moves that are over."""
    num_bytes: Counter[MoveKind] = field(default_factory=lambda: Counter(dict.fromkeys(_KINDS, 0)))
    """Bytes of moves that are DONE."""
    seconds: dict[MoveKind, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    """Time that threads spent on moves: verification and copy, not the queue."""

    def page_s(self, kind: MoveKind) -> float | None:
        """Return a thread's seconds for each page so far; None: there was none."""
        num_pages = self.counts[kind, MoveStatus.DONE]
        return self.seconds[kind] / num_pages if num_pages else None

    def finished(self, move: Move, status: MoveStatus, num_bytes: int, seconds: float) -> None:
        """Count a move that is over."""
        self.counts[move.kind, status] += 1
        self.seconds[move.kind] += seconds
        if status is MoveStatus.DONE:
            self.num_bytes[move.kind] += num_bytes


class Fault(NamedTuple):
    """What happens to one move."""

    delay_s: float = 0.0
    """Before anything is looked at."""
    copy_delay_s: float = 0.0
    """In the middle of the copy."""
    fails: bool = False
    corrupts: bool = False


NO_FAULT = Fault()


@dataclass(frozen=True)
class MoveInjection:
    """Faults for tests, a function of seed, rank and move alone: not of which thread is faster.

    No configuration reaches it.
    """

    seed: int
    max_delay_s: float = 0.0
    """A move waits up to so long before it begins, and once more within its copy."""
    failure_ratio: float = 0.0
    """Of all moves: FAILED_IO, before anything was copied."""
    corruption_ratio: float = 0.0
    """Of SAVEs: one bit of the bytes in the arena flips once their checksum is written."""
    reorder_window: int = 0
    """A move may be taken before others that stand up to so many places ahead of it."""
    during_copy: Callable[[Move], None] | None = None
    """Called in the mover's thread when half of a move's bytes are copied."""

    def fault(self, move: Move, part: int) -> Fault:
        """Return what happens to a move on the rank whose bundles are the slots' `part`."""
        random = Random(f"{self.seed}/{part}/{move.number}")
        return Fault(
            delay_s=random.uniform(0, self.max_delay_s),
            copy_delay_s=random.uniform(0, self.max_delay_s),
            fails=random.random() < self.failure_ratio,
            corrupts=move.kind == "save" and random.random() < self.corruption_ratio,
        )

    def place(self, move: Move, part: int) -> int:
        """Return a move's place in the queue."""
        random = Random(f"place/{self.seed}/{part}/{move.number}")
        return move.number + random.randint(0, self.reorder_window)
