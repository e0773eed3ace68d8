"""What tests do to pages on their way from and to other nodes: a Transfer and a RemoteStore, failing by seed.

Both stand before real ones. No configuration reaches them.
"""

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from cache_service.keys import PageKey
from cache_service.remote import (
    GetResult,
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStore,
)
from cache_service.remote_worker import Batch
from cache_service.store_address import StoreAddress, open_store
from cache_service.transfer import ReadStatus, RemoteRun, Transfer

T = TypeVar("T")

_JUNK = 0x5A


@dataclass(frozen=True)
class PageInjection:
    """Faults of FETCH and PUT, a function of seed and call number alone."""

    seed: int
    max_delay_s: float = 0.0
    """Each call begins up to so much later."""
    failure_ratio: float = 0.0
    """Of pages; of calls to put."""
    corruption_ratio: float = 0.0
    """Of pages: a bit flips on the wire, or on its way into the store."""
    late_ratio: float = 0.0
    """Of calls: they fail, and their buffers are used for up to `max_late_s` more."""
    max_late_s: float = 0.0

    def random(self, kind: str, call: int) -> Random:
        """Return what decides about one call."""
        return Random(f"{self.seed}/{kind}/{call}")


class InjectedTransfer:
    """See Transfer."""

    def __init__(self, transfer: Transfer, injection: PageInjection) -> None:
        self.segment = transfer.segment
        self._transfer = transfer
        self._injection = injection
        self._calls = itertools.count(1)
        self._late = _LateWriters()

    def register(self, memory: memoryview) -> int:
        """See Transfer."""
        return self._transfer.register(memory)

    def read(self, segment: str, runs: Sequence[RemoteRun], timeout_s: float) -> Batch[ReadStatus]:
        """See Transfer."""
        injection, random = self._injection, self._injection.random("read", next(self._calls))
        left_s = _delay(random, injection, timeout_s)
        batch = self._transfer.read(segment, runs, left_s)
        if not batch.quiet.is_set():
            return batch
        if random.random() < injection.late_ratio:
            late_s = random.uniform(0, injection.max_late_s)
            return self._late.begin([run.into for run in runs], ReadStatus.FAILED, late_s)
        statuses = list(batch.results)
        for place, run in enumerate(runs):
            if random.random() < injection.corruption_ratio:
                run.into[random.randrange(run.into.nbytes)] ^= 1 << random.randrange(8)
            if random.random() < injection.failure_ratio:
                statuses[place] = ReadStatus.FAILED
        return _answer(statuses)

    def forget(self, segment: str) -> None:
        """See Transfer."""
        self._transfer.forget(segment)

    def close(self, timeout_s: float) -> bool:
        """See Transfer."""
        has_ended = self._late.close(timeout_s)
        return self._transfer.close(timeout_s) and has_ended


class InjectedStore:
    """See RemoteStore."""

    def __init__(self, store: RemoteStore, injection: PageInjection) -> None:
        self.stats = store.stats
        self._store = store
        self._injection = injection
        self._puts = itertools.count(1)
        self._gets = itertools.count(1)
        self._late = _LateWriters()

    def put(self, pages: Sequence[PageRecord], timeout_s: float) -> Batch[PutStatus]:
        """See RemoteStore."""
        injection, random = self._injection, self._injection.random("put", next(self._puts))
        left_s = _delay(random, injection, timeout_s)
        if random.random() < injection.failure_ratio:
            self.stats.count_failure("put: injected")
            return _answer([PutStatus.FAILED] * len(pages))
        sent = [
            _with_wrong_bit(page, random) if random.random() < injection.corruption_ratio else page
            for page in pages
        ]
        return self._store.put(sent, left_s)

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """See RemoteStore."""
        injection, random = self._injection, self._injection.random("get", next(self._gets))
        left_s = _delay(random, injection, timeout_s)
        batch = self._store.get(pages, left_s)
        if not batch.quiet.is_set():
            return batch
        if random.random() < injection.late_ratio:
            late_s = random.uniform(0, injection.max_late_s)
            return self._late.begin([page.data for page in pages], GetResult(GetStatus.FAILED), late_s)
        failed = GetResult(GetStatus.FAILED)
        return _answer(
            [failed if random.random() < injection.failure_ratio else result for result in batch.results]
        )

    def known_keys(self) -> list[PageKey]:
        """See RemoteStore."""
        return self._store.known_keys()

    def close(self, timeout_s: float) -> bool:
        """See RemoteStore."""
        has_ended = self._late.close(timeout_s)
        return self._store.close(timeout_s) and has_ended


@dataclass(frozen=True)
class InjectedOpener:
    """An OpenStore of stores in which things go wrong. It can be pickled."""

    injection: PageInjection

    def __call__(
        self, address: StoreAddress, layout: RecordLayout, memory: memoryview, node: str
    ) -> RemoteStore:
        """See OpenStore."""
        return InjectedStore(open_store(address, layout, memory, node), self.injection)


class _LateWriters:
    """Threads that write junk into buffers whose call has failed."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self, buffers: Sequence[memoryview], status: T, late_s: float) -> Batch[T]:
        """Return a failed batch that is quiet `late_s` later, or once it is closed."""
        batch = _answer([status] * len(buffers), is_quiet=False)

        def write() -> None:
            self._closing.wait(late_s)
            for buffer in buffers:
                buffer[:] = bytes([_JUNK]) * buffer.nbytes
            batch.let_go()

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=write, name="late-writer", daemon=True))
        self._threads[-1].start()
        return batch

    def close(self, timeout_s: float) -> bool:
        """End them; tell whether they have."""
        self._closing.set()
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _delay(random: Random, injection: PageInjection, timeout_s: float) -> float:
    """Wait, but not beyond a call's deadline; return what is left of its time."""
    delay_s = min(random.uniform(0, injection.max_delay_s), timeout_s)
    time.sleep(delay_s)
    return timeout_s - delay_s


def _answer(results: Sequence[T], *, is_quiet: bool = True) -> Batch[T]:
    batch: Batch[T] = Batch(len(results))
    batch.begin()
    if not is_quiet:
        batch.hold()
    batch.end()
    batch.results = list(results)
    return batch


def _with_wrong_bit(page: PageRecord, random: Random) -> PageRecord:
    data = bytearray(page.data)
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return PageRecord(page.key, page.length, page.checksums, memoryview(data))
