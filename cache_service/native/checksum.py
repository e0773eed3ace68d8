"""Checksums: those of many bundles at once, by compiled threads, without the interpreter's lock.

Used by movers whose pages move faster than one thread reads; the values are `bundle_checksum`'s.
"""

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cache_service.native.build import COMPILERS, NativeSources, built_library, default_cache_folder

_CHECKSUM = NativeSources(name="checksum", package="cache_service.native", sources=("checksum.cpp",))
MIN_BYTES = 241
"""Shorter runs have other rules, which no bundle needs."""


class _Library(Protocol):
    """The compiled functions; checksum.cpp has their parameters."""

    def eyrie_checksums_open(self, num_threads: int) -> int: ...
    def eyrie_checksums_close(self, pool: int) -> None: ...
    def eyrie_checksums_begin(
        self, pool: int, addresses: int, seeds: int, num_bytes: int, count: int
    ) -> int: ...
    def eyrie_checksums_is_done(self, pool: int, job: int) -> bool: ...
    def eyrie_checksums_wait(self, pool: int, job: int) -> None: ...
    def eyrie_checksums_take(self, pool: int, job: int, sums: int) -> None: ...


class Checksums:
    """`num_threads` threads that do what any thread begins, in that order; 0: it is done at once, by itself.

    Raises NativeBuildError where it cannot be compiled.
    """

    def __init__(
        self, num_threads: int, cache_folder: Path | None = None, compilers: Sequence[str] = COMPILERS
    ) -> None:
        path = built_library(_CHECKSUM, cache_folder or default_cache_folder(), compilers)
        self._library = _loaded(path)
        self._pool: int | None = self._library.eyrie_checksums_open(num_threads)

    def begin(self, addresses: Sequence[int], num_bytes: int, seeds: Sequence[int]) -> "Sums":
        """Begin to compute the checksum of the `num_bytes` bytes at each address, with each's seed.

        The bytes stay where they are until the result is taken or this is closed.
        """
        assert self._pool is not None, "closed"
        assert num_bytes >= MIN_BYTES, f"runs of {num_bytes} bytes; {MIN_BYTES} are the least"
        assert len(addresses) == len(seeds), f"{len(addresses)} runs, {len(seeds)} seeds"
        starts, words, count = array("Q", addresses), array("Q", seeds), len(addresses)
        job = self._library.eyrie_checksums_begin(
            self._pool, starts.buffer_info()[0], words.buffer_info()[0], num_bytes, count
        )
        return Sums(self._library, self._pool, job, count)

    def close(self) -> None:
        """End the threads; nobody calls any more, nor asks for a result. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._library.eyrie_checksums_close(pool)


class Sums:
    """Checksums that are being computed. Made by Checksums, of which one thread takes them."""

    def __init__(self, library: _Library, pool: int, job: int, count: int) -> None:
        self._library = library
        self._pool = pool
        self._job = job
        self._count = count

    def query(self) -> bool:
        """Tell whether they are there."""
        return self._library.eyrie_checksums_is_done(self._pool, self._job)

    def synchronize(self) -> None:
        """Wait until they are there."""
        self._library.eyrie_checksums_wait(self._pool, self._job)

    def take(self) -> list[int]:
        """Return them, once; waits for them. None is 0."""
        sums = array("Q", bytes(8 * self._count))
        self._library.eyrie_checksums_take(self._pool, self._job, sums.buffer_info()[0])
        return [checksum or 1 for checksum in sums]


def _loaded(path: Path) -> _Library:
    library = ctypes.CDLL(str(path))  # its calls drop the interpreter's lock
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.eyrie_checksums_open.argtypes = [size]
    library.eyrie_checksums_open.restype = pointer
    library.eyrie_checksums_close.argtypes = [pointer]
    library.eyrie_checksums_close.restype = None
    library.eyrie_checksums_begin.argtypes = [pointer, pointer, pointer, size, size]
    library.eyrie_checksums_begin.restype = pointer
    library.eyrie_checksums_is_done.argtypes = [pointer, pointer]
    library.eyrie_checksums_is_done.restype = ctypes.c_bool
    library.eyrie_checksums_wait.argtypes = [pointer, pointer]
    library.eyrie_checksums_wait.restype = None
    library.eyrie_checksums_take.argtypes = [pointer, pointer, pointer]
    library.eyrie_checksums_take.restype = None
    return library
