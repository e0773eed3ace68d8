"""Moves: single copies of a page between KVPool and arena, what is counted of them, and what tests inject.

Made by PageMover from a plan's SavePages and LoadPages. No torch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, NamedTuple

from cache_service.keys import PageKey
from workers.move_board import MoveStatus
from workers.plan import LoadPages, SavePages

MoveKind = Literal["save", "load"]
WaitKind = Literal["stream", "host"]
_KINDS: tuple[MoveKind, ...] = ("save", "load")
_WAITS: tuple[WaitKind, ...] = ("stream", "host")


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
    """Time that moves took: verification and copy, not the queue. Checks of one batch beside the copies of
    another count twice."""
    num_copies: Counter[MoveKind] = field(default_factory=lambda: Counter(dict.fromkeys(_KINDS, 0)))
    """Copies that a device's copy engines were given: a run of neighbouring pages is one."""
    num_bounced: Counter[MoveKind] = field(default_factory=lambda: Counter(dict.fromkeys(_KINDS, 0)))
    """Pages that went through a bounce buffer: their slots are not pinned, or not yet."""
    num_waits: Counter[WaitKind] = field(default_factory=lambda: Counter(dict.fromkeys(_WAITS, 0)))
    """Steps that came after LOADs in flight, by who waited: the device's `stream`, or the `host`. That
    is how a CPU does it; on CUDA it is an error path: a step read a page whose LOAD was not enqueued here."""
    num_pinned_bytes: Callable[[], int] = lambda: 0
    """Of the arena, which the device copies by itself."""

    def page_s(self, kind: MoveKind) -> float | None:
        """Return a thread's seconds for each page so far; None: there was none."""
        num_pages = self.counts[kind, MoveStatus.DONE]
        return self.seconds[kind] / num_pages if num_pages else None

    def copied(self, kind: MoveKind, num_copies: int, num_bounced: int) -> None:
        """Count copies that were enqueued on a device."""
        self.num_copies[kind] += num_copies
        self.num_bounced[kind] += num_bounced

    def finished(
        self, kind: MoveKind, statuses: Sequence[MoveStatus], bundle_bytes: int, seconds: float
    ) -> None:
        """Count moves that are over, which took so long together."""
        failed = [status for status in statuses if status is not MoveStatus.DONE]
        num_done = len(statuses) - len(failed)
        self.counts[kind, MoveStatus.DONE] += num_done
        self.num_bytes[kind] += num_done * bundle_bytes
        for status in failed:
            self.counts[kind, status] += 1
        self.seconds[kind] += seconds


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
    """Called in the mover's thread within a move's copy: on a CPU when half of its bytes are copied, on
    another device once it is enqueued."""

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
