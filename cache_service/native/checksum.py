"""Checksums: those of many bundles at once, by compiled threads, without the interpreter's lock.

Used by movers whose pages move faster than one thread reads; the values are `bundle_checksum`'s.
"""

import ctypes
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
    def eyrie_checksums(
        self,
        pool: int,
        addresses: "ctypes.Array[ctypes.c_uint64]",
        seeds: "ctypes.Array[ctypes.c_uint64]",
        sums: "ctypes.Array[ctypes.c_uint64]",
        num_bytes: int,
        count: int,
    ) -> None: ...


class Checksums:
    """`num_threads` threads that help whoever calls; any thread may, several at a time.

    Raises NativeBuildError where it cannot be compiled.
    """

    def __init__(
        self, num_threads: int, cache_folder: Path | None = None, compilers: Sequence[str] = COMPILERS
    ) -> None:
        library = built_library(_CHECKSUM, cache_folder or default_cache_folder(), compilers)
        self._library = _loaded(library)
        self._pool: int | None = self._library.eyrie_checksums_open(num_threads)

    def of(self, addresses: Sequence[int], num_bytes: int, seeds: Sequence[int]) -> list[int]:
        """Return the checksum of the `num_bytes` bytes at each address, with each's seed; none is 0."""
        assert self._pool is not None, "closed"
        assert num_bytes >= MIN_BYTES, f"runs of {num_bytes} bytes; {MIN_BYTES} are the least"
        words = ctypes.c_uint64 * len(addresses)
        sums = words()
        self._library.eyrie_checksums(
            self._pool, words(*addresses), words(*seeds), sums, num_bytes, len(addresses)
        )
        return [checksum or 1 for checksum in sums]

    def close(self) -> None:
        """End the threads; nobody calls any more. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._library.eyrie_checksums_close(pool)


def _loaded(path: Path) -> _Library:
    library = ctypes.CDLL(str(path))  # its calls drop the interpreter's lock
    library.eyrie_checksums_open.argtypes = [ctypes.c_size_t]
    library.eyrie_checksums_open.restype = ctypes.c_void_p
    library.eyrie_checksums_close.argtypes = [ctypes.c_void_p]
    library.eyrie_checksums_close.restype = None
    words = ctypes.POINTER(ctypes.c_uint64)
    library.eyrie_checksums.argtypes = [
        ctypes.c_void_p,
        words,
        words,
        words,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    library.eyrie_checksums.restype = None
    return library
