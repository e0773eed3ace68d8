"""Prefault: gives an arena's file its memory in the background, so that no first touch stalls a copy."""

import ctypes
import logging
import os
import threading
from collections.abc import Callable

from cache_service.arena import Arena

logger = logging.getLogger(__name__)

_libc = ctypes.CDLL(None)

_STEP_BYTES = 64 << 20
"""At the slowest first touch measured, 0.4 GB/s, a step takes 0.16 s: so long a stop may have to wait."""
_STOP_TIMEOUT_S = 60.0
_MEMORY_PAGE_BYTES = 4096
_MADV_POPULATE_WRITE = 23
"""Linux >= 5.14; an older one refuses it, and first touches stay as slow as they are."""


class Prefault:
    """A thread that allocates the file step by step; slots become usable as their memory does.

    What this process writes for others, pages from other nodes and stores, then takes no faults either: with
    them a FETCH of 360 KiB pages runs at half its speed until it has touched every slot once.
    """

    def __init__(
        self,
        descriptor: int,
        arena: Arena,
        step_bytes: int = _STEP_BYTES,
        allocate: Callable[[int, int, int], None] = os.posix_fallocate,
    ) -> None:
        self._descriptor = descriptor
        self._arena = arena
        self._step_bytes = step_bytes
        # Not madvise: this says ENOSPC where a touch would end in SIGBUS, and lets other threads run.
        self._allocate = allocate
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arena-prefault", daemon=True)
        self.error: OSError | None = None
        """Why the rest of the arena stays unusable, if it does."""

    def start(self) -> None:
        """Begin with the first slot that is not usable."""
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is done or failed; tell whether it is."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End within a step. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        spec = self._arena.spec
        usable = self._arena.num_usable_slots
        slots_per_step = max(1, self._step_bytes // spec.slot_bytes)
        for first in range(0, usable, slots_per_step):  # of an arena that another server left
            if not self._stopping.is_set():
                _map(self._arena, first, min(first + slots_per_step, usable))
        while usable < spec.num_slots and not self._stopping.is_set():
            count = min(slots_per_step, spec.num_slots - usable)
            start = self._arena.bundle_offset(usable, 0)
            try:
                self._allocate(self._descriptor, start, count * spec.slot_bytes)
            except OSError as error:
                self.error = error
                logger.error(
                    "the arena's memory could not be had; the slots it has so far are used",
                    extra={"path": str(self._arena.path), "usable": usable, "of": spec.num_slots},
                    exc_info=True,
                )
                return
            usable += count
            self._arena.num_usable_slots = usable
            _map(self._arena, usable - count, usable)


def _map(arena: Arena, first: int, stop: int) -> None:
    """Fill this process's page tables for slots that have memory. ctypes lets other threads run meanwhile."""
    spec, base = arena.spec, arena.bundles(0).ctypes.data
    start = (base + first * spec.slot_bytes) // _MEMORY_PAGE_BYTES * _MEMORY_PAGE_BYTES
    num_bytes = base + stop * spec.slot_bytes - start
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE)
