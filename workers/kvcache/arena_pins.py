"""ArenaPins: has the device copy from and to the arena itself, piece by piece as it becomes pinned.

A thread of its own pins pieces in the background, once for each process; slots of other pieces are copied
through a bounce buffer meanwhile. No torch.
"""

import logging
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy
from numpy.typing import NDArray

from cache_service.arena import Arena
from workers.kvcache.copy_streams import HostPinning

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
"""Pinning takes 0.06 to 0.16 s/GB and may hold up the device's other calls for that long: 10 ms at most."""
BOUNCE_BYTES = 32 << 20
_PAGE_BYTES = 4096
_LOOK_S = 0.1
"""Between looks at how far the arena is prefaulted."""
_STOP_TIMEOUT_S = 30.0


class ArenaPins:
    """Pinned pieces of one mapped arena, each a multiple of slots; no copy may span two of them."""

    def __init__(self, arena: Arena, pinning: HostPinning, piece_bytes: int = PIECE_BYTES) -> None:
        spec = arena.spec
        # No two pieces share a page of memory.
        unit = math.lcm(spec.slot_bytes, _PAGE_BYTES) // spec.slot_bytes
        self._slots_per_piece = unit * max(1, piece_bytes // (unit * spec.slot_bytes))
        self._arena = arena
        self._pinning = pinning
        self._data: NDArray[numpy.uint8] = arena.bundles(0)
        self._base = self._data.ctypes.data
        self._num_pieces = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_bytes = 0
        """Pinned so far."""
        self.error: str | None = None
        """Why the rest stays unpinned, if it does."""

    def start(self, enter_thread: Callable[[], None]) -> None:
        """Begin to pin, in a thread that calls `enter_thread` first."""
        self._thread = threading.Thread(
            target=self._run, args=(enter_thread,), name="arena-pins", daemon=True
        )
        self._thread.start()

    def pin_next(self) -> bool:
        """Pin the next piece; False: it is not usable yet, there is none, or an error ended it."""
        spec, first = self._arena.spec, self._num_pieces * self._slots_per_piece
        stop = min(first + self._slots_per_piece, spec.num_slots)
        if self.error is not None or first >= stop or stop > self._arena.num_usable_slots:
            return False
        num_bytes = (stop - first) * spec.slot_bytes
        try:
            self._pinning.pin(self._base + first * spec.slot_bytes, num_bytes)
        except RuntimeError as error:
            self.error = str(error)
            logger.error(
                "the arena could not be pinned any further: the rest is copied through a buffer",
                extra={
                    "pinned_bytes": self.num_bytes,
                    "of": spec.num_slots * spec.slot_bytes,
                    "why": self.error,
                },
            )
            return False
        self.num_bytes += num_bytes
        self._num_pieces += 1  # from now on other threads use it
        return True

    def piece(self, slot: int) -> int | None:
        """Return the number of a slot's piece; None: it is not pinned."""
        piece = slot // self._slots_per_piece
        return piece if piece < self._num_pieces else None

    def close(self) -> None:
        """Unpin everything. No copy is under way; the arena is still mapped. Idempotent."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)
        spec = self._arena.spec
        while self._num_pieces:
            self._num_pieces -= 1
            try:
                self._pinning.unpin(self._base + self._num_pieces * self._slots_per_piece * spec.slot_bytes)
            except RuntimeError as error:  # of a device that has failed: the process ends, and the pins do
                logger.error("a piece of the arena could not be unpinned", extra={"why": str(error)})
        self.num_bytes = 0
        self._data = self._data[:0].copy()

    def _run(self, enter_thread: Callable[[], None]) -> None:
        enter_thread()
        self._arena.prefer_huge_pages()
        while not self._stopping.is_set():
            if self.pin_next():
                continue
            if (
                self.error is not None
                or self.num_bytes == self._arena.spec.num_slots * self._arena.spec.slot_bytes
            ):
                break
            self._stopping.wait(_LOOK_S)
        logger.info(
            "the arena is pinned",
            extra={
                "bytes": self.num_bytes,
                "pieces": self._num_pieces,
                "huge_page_bytes": huge_page_bytes(self._arena.path),
            },
        )


class Bounce:
    """Pinned frames of a page each, for slots that are not pinned. Made on first use; one thread's."""

    def __init__(self, pinning: HostPinning, bundle_bytes: int, num_bytes: int = BOUNCE_BYTES) -> None:
        self._pinning = pinning
        self._bundle_bytes = bundle_bytes
        self._num_frames = max(2, num_bytes // bundle_bytes)
        self._free = list(range(self._num_frames))
        self._frames: NDArray[numpy.uint8] | None = None

    def take(self) -> int | None:
        """Return a free frame; None: all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, frame: int) -> None:
        """Return a frame that no copy touches any more."""
        self._free.append(frame)

    def frame(self, frame: int) -> NDArray[numpy.uint8]:
        """Return a frame's bytes."""
        if self._frames is None:
            octets = self._pinning.pinned(self._num_frames * self._bundle_bytes)
            self._frames = octets.reshape(self._num_frames, self._bundle_bytes)
        found: NDArray[numpy.uint8] = self._frames[frame]
        return found


def huge_page_bytes(path: Path) -> int:
    """Return how much of a file this process has mapped in huge pages; the system decides that."""
    num_bytes, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("ShmemPmdMapped:"):
            num_bytes += int(line.split()[1]) * 1024
    return num_bytes
