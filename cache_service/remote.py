"""RemoteStore: where pages go beyond this node; what every store's record looks like and answers.

A record is one page of all ranks: a header that says whose bytes follow, then the slot's bytes. Whoever reads
one checks the header first and the bytes after the copy; what is not right is a miss.
"""

import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import xxhash

from cache_service.arena_format import FINGERPRINT_BYTES, MAX_RANKS, bundle_checksum
from cache_service.keys import KEY_BYTES, PageKey
from cache_service.remote_worker import Batch, RemoteWorker

RECORD_MAGIC = b"EYRIEREC"
RECORD_FORMAT_VERSION = 1
RECORD_HEADER_BYTES = 256
MAX_DESCRIPTORS = 256
"""Runs of bytes in one request to a store or a peer; more are split."""

# magic, format version, ranks, key, fingerprint, bundle bytes, length in tokens, spare, checksum of each rank
_HEADER = struct.Struct(f"<8sII{KEY_BYTES}s{FINGERPRINT_BYTES}sQII{MAX_RANKS}Q")
_HEADER_CHECKSUM = struct.Struct("<Q")


class PutStatus(Enum):
    """What became of a page to be put."""

    STORED = "stored"
    PRESENT = "present"
    """The store had the key already: the first writer wins."""
    FULL = "full"
    """The store has no room, or the disk none."""
    TIMED_OUT = "timed_out"
    FAILED = "failed"


class GetStatus(Enum):
    """What became of a page to be got. All but FOUND are misses, and the buffer then holds anything."""

    FOUND = "found"
    MISSING = "missing"
    FOREIGN = "foreign"
    """A record of another format version or layout."""
    CORRUPT = "corrupt"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(frozen=True)
class RecordLayout:
    """What reader and writer of a record must agree on."""

    fingerprint: bytes
    bundle_bytes: int
    num_ranks: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one page, all ranks together."""
        return self.bundle_bytes * self.num_ranks

    def name(self, key: PageKey) -> str:
        """Return what a store calls a page's record: no two formats or layouts share a name."""
        return f"{key.hex()}{self._ending}"

    def key_of(self, name: str) -> PageKey | None:
        """Return the page whose record has this name; None for names of other formats and layouts."""
        try:
            key = PageKey(bytes.fromhex(name[: 2 * KEY_BYTES]))
        except ValueError:
            return None
        return key if self.name(key) == name else None

    @property
    def _ending(self) -> str:
        sizes = struct.pack("<QI", self.bundle_bytes, self.num_ranks)
        return f"-{xxhash.xxh3_64_hexdigest(self.fingerprint + sizes)}-v{RECORD_FORMAT_VERSION}"


@dataclass(frozen=True)
class PageRecord:
    """A page to be put: `data` is its slot's bytes, `checksums` are those of its ranks' bundles.

    The caller holds the slot's lease until the batch is quiet.
    """

    key: PageKey
    length: int
    checksums: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class PageBuffer:
    """A page to be got into `data`, a slot the caller may write until the batch is quiet."""

    key: PageKey
    data: memoryview


@dataclass(frozen=True)
class GetResult:
    """The answer to one page; `length` and `checksums` are the record's own, for the slot's header."""

    status: GetStatus
    length: int = 0
    checksums: tuple[int, ...] = ()


class RemoteStats:
    """A store's failures since its start; any thread counts."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """What lies behind FULL, FAILED and CORRUPT."""
        self._lock = threading.Lock()

    def count_failure(self, reason: str) -> None:
        """Count what lies behind an answer."""
        with self._lock:
            self.failures[reason] += 1


class RemoteStore(Protocol):
    """Keeps records by key. Methods may be called from any thread and return within `timeout_s`.

    Whatever fails is an answer, never an exception. After a timeout or a failure the buffers may be in use
    still: until `quiet` of the batch is set.
    """

    stats: RemoteStats

    def put(self, pages: Sequence[PageRecord], timeout_s: float) -> Batch[PutStatus]:
        """Store pages; one status a page, in order."""
        ...

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """Read pages, verified; one result a page, in order."""
        ...

    def known_keys(self) -> list[PageKey]:
        """Return the pages it can list, last used last; none where nobody keeps such a list."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Give everything back; False where a call still hangs: its thread then ends when it returns."""
        ...


def run_put(
    worker: RemoteWorker,
    work: Callable[[Batch[PutStatus]], None],
    pages: Sequence[PageRecord],
    timeout_s: float,
) -> Batch[PutStatus]:
    """Let a worker put pages in its thread, within the caller's deadline."""
    return worker.run(work, len(pages), timeout_s, timed_out=PutStatus.TIMED_OUT, failed=PutStatus.FAILED)


def run_get(
    worker: RemoteWorker,
    work: Callable[[Batch[GetResult]], None],
    pages: Sequence[PageBuffer],
    timeout_s: float,
) -> Batch[GetResult]:
    """Let a worker get pages in its thread, as `run_put` does."""
    return worker.run(
        work,
        len(pages),
        timeout_s,
        timed_out=GetResult(GetStatus.TIMED_OUT),
        failed=GetResult(GetStatus.FAILED),
    )


def pack_header(layout: RecordLayout, page: PageRecord) -> bytes:
    """Return a record's header, RECORD_HEADER_BYTES long."""
    assert len(page.checksums) == layout.num_ranks and page.data.nbytes == layout.slot_bytes
    checksums = (*page.checksums, *([0] * (MAX_RANKS - layout.num_ranks)))
    header = _HEADER.pack(
        RECORD_MAGIC,
        RECORD_FORMAT_VERSION,
        layout.num_ranks,
        page.key,
        layout.fingerprint,
        layout.bundle_bytes,
        page.length,
        0,
        *checksums,
    )
    return (header + _HEADER_CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))).ljust(
        RECORD_HEADER_BYTES, b"\0"
    )


def read_header(header: bytes | bytearray | memoryview, layout: RecordLayout, key: PageKey) -> GetResult:
    """Return FOUND with length and checksums, FOREIGN, or CORRUPT for what is no header of this key."""
    if len(header) < RECORD_HEADER_BYTES:
        return GetResult(GetStatus.CORRUPT)
    magic, version = struct.unpack_from("<8sI", header)
    if magic != RECORD_MAGIC:
        return GetResult(GetStatus.CORRUPT)
    if version != RECORD_FORMAT_VERSION:
        return GetResult(GetStatus.FOREIGN)
    (checksum,) = _HEADER_CHECKSUM.unpack_from(header, _HEADER.size)
    if checksum != xxhash.xxh3_64_intdigest(header[: _HEADER.size]):
        return GetResult(GetStatus.CORRUPT)
    _, _, num_ranks, found_key, fingerprint, bundle_bytes, length, _, *checksums = _HEADER.unpack_from(header)
    if (fingerprint, bundle_bytes, num_ranks) != (layout.fingerprint, layout.bundle_bytes, layout.num_ranks):
        return GetResult(GetStatus.FOREIGN)
    if found_key != key:
        return GetResult(GetStatus.CORRUPT)
    return GetResult(GetStatus.FOUND, length, tuple(checksums[:num_ranks]))


def verify(header: GetResult, layout: RecordLayout, page: PageBuffer) -> GetResult:
    """Return the header's result, or CORRUPT where the bytes in `page.data` are not those it vouches for."""
    if header.status is not GetStatus.FOUND:
        return header
    for rank, checksum in enumerate(header.checksums):
        bundle = page.data[rank * layout.bundle_bytes : (rank + 1) * layout.bundle_bytes]
        if bundle_checksum(bundle, page.key, rank) != checksum:
            return GetResult(GetStatus.CORRUPT)
    return header
