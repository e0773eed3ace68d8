"""What a mover needs of a device that copies by itself: streams, marks in them, pinned host memory.

cuda_copies.py has CUDA's; tests bring fakes that run streams in any order. No torch.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy
from numpy.typing import NDArray

from workers.kvcache.move_queue import Mark
from workers.kvcache.moves import MoveKind


class Copy(NamedTuple):
    """Pages side by side in the pool, and as many bundles side by side at an address of the host."""

    page: int
    num_pages: int
    address: int


class CopyStreams(Protocol):
    """The compute stream is the current one of the calling thread; SAVEs and LOADs have one each."""

    def mark(self) -> Mark:
        """Return a place in the compute stream behind all that it has been given so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Have what the compute stream is given from now on come after `mark`; never blocks."""

    def copy(self, kind: MoveKind, copies: Sequence[Copy], after: Mark | None) -> tuple[Mark, Mark]:
        """Enqueue copies that come after `after`; return the marks before and behind them."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the device's time from one mark to another, which it has passed."""
        ...

    def drain(self, kind: MoveKind) -> None:
        """Wait until all copies of a kind are over."""

    def enter_thread(self) -> None:
        """Make the device the calling thread's; each thread of a mover begins so."""


class HostPinning(Protocol):
    """Makes host memory such that the device copies from and to it by itself."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Pin memory in place, until `unpin`. Raises RuntimeError where it cannot be."""

    def unpin(self, address: int) -> None:
        """Undo `pin`. Raises RuntimeError."""

    def pinned(self, num_bytes: int) -> NDArray[numpy.uint8]:
        """Return new memory that is pinned as long as it lives."""
        ...


def copy_runs(places: Iterable[tuple[int, int, int | None]], bundle_bytes: int) -> list[Copy]:
    """Return one copy for each run of neighbours in pool and host; none spans two pieces of the host.

    `places` are page, address and piece of each; without a piece it is copied by itself.
    """
    copies: list[Copy] = []
    next_page = next_address = 0
    last_piece: int | None = None
    for page, address, piece in sorted(places):
        if page == next_page and address == next_address and piece is not None and piece == last_piece:
            first, num_pages, start = copies[-1]
            copies[-1] = Copy(first, num_pages + 1, start)
        else:
            copies.append(Copy(page, 1, address))
        next_page, next_address, last_piece = page + 1, address + bundle_bytes, piece
    return copies
