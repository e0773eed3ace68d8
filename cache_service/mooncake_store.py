"""MooncakeStore: records in a Mooncake Store, whose master and segments are other processes' business.

The master's death loses all it knows, never more than pages. Mooncake's calls then block for seconds, and for
60 s when a segment's owner hangs: they run in threads, callers leave at their own deadline, and a reader that
hangs or fails is replaced by a fresh one (its buffers are quiet once it is closed).
"""

import logging
import threading
from collections.abc import Callable, Sequence

from cache_service.keys import PageKey
from cache_service.mooncake_client import MAX_RECORDS, MooncakeClient
from cache_service.mooncake_library import MooncakeError, MooncakeOptions
from cache_service.remote import (
    GetResult,
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStats,
    run_get,
    run_put,
)
from cache_service.remote_worker import Batch, RemoteWorker, in_parts

logger = logging.getLogger(__name__)

MAX_RETIRED = 4
"""Readers given up whose last call has not returned; with so many, gets fail at once."""


class MooncakeStore:
    """See RemoteStore. `memory` is what pages lie in and are got into: the arena, registered here.

    `segment_bytes` of this process's memory are added to the pool that the store keeps records in. A put that
    failed may still be sent: what its slot holds by then does not match the record's checksums.
    """

    def __init__(
        self,
        master: str,
        layout: RecordLayout,
        memory: memoryview,
        options: MooncakeOptions,
        *,
        segment_bytes: int = 0,
        setup_timeout_s: float = 15.0,
    ) -> None:
        self.stats = RemoteStats()
        self._make_client: Callable[[], MooncakeClient] = lambda: MooncakeClient(
            master, layout, memory, options, self.stats
        )
        self._client = MooncakeClient(master, layout, memory, options, self.stats, segment_bytes)
        self._writer = RemoteWorker("mooncake-store-writer")
        self._lock = threading.Lock()
        self._reader: _Reader | None = None
        self._retired: list[_Reader] = []
        self._is_closed = False
        self._closer: threading.Thread | None = None
        fault = self._join_store(setup_timeout_s)
        if fault:
            self.close(0.0)
            raise MooncakeError(fault)

    def put(self, pages: Sequence[PageRecord], timeout_s: float) -> Batch[PutStatus]:
        """See RemoteStore."""

        def work(batch: Batch[PutStatus]) -> None:
            in_parts(batch, pages, MAX_RECORDS, self._client.put)

        return run_put(self._writer, work, pages, timeout_s)

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """See RemoteStore."""
        reader = self._current_reader()
        if reader is None:
            batch: Batch[GetResult] = Batch(len(pages))
            batch.finish(GetResult(GetStatus.FAILED))
            return batch
        batch = run_get(reader.worker, lambda batch: reader.get(batch, pages), pages, timeout_s)
        if not batch.quiet.is_set():
            self._retire(reader)
        return batch

    def known_keys(self) -> list[PageKey]:
        """See RemoteStore: the master lists nothing."""
        return []

    def close(self, timeout_s: float) -> bool:
        """See RemoteStore."""
        with self._lock:
            self._is_closed = True
            reader = self._reader
        if reader is not None:
            self._retire(reader)
        self._writer.close(0.0)
        if self._closer is None:
            self._closer = threading.Thread(target=self._say_goodbye, name="mooncake-close", daemon=True)
            self._closer.start()
        self._closer.join(timeout_s)
        return not self._closer.is_alive()

    def _join_store(self, timeout_s: float) -> str:
        """Return why the store cannot be joined, or nothing."""

        def work(batch: Batch[str]) -> None:
            try:
                self._client.join()
                batch.fill(0, "")
            except MooncakeError as error:
                batch.fill(0, str(error))

        timed_out = f"the Mooncake store did not let us in within {timeout_s:g} s; look at its master's log"
        batch = self._writer.run(work, 1, timeout_s, timed_out=timed_out, failed="joining Mooncake failed")
        return batch.results[0]

    def _current_reader(self) -> "_Reader | None":
        with self._lock:
            if self._is_closed:
                return None
            if self._reader is None:
                self._retired = [reader for reader in self._retired if not reader.is_closed]
                if len(self._retired) >= MAX_RETIRED:
                    self.stats.count_failure("get: too many calls hang")
                    return None
                self._reader = _Reader(self._make_client())
            return self._reader

    def _retire(self, reader: "_Reader") -> None:
        with self._lock:
            if self._reader is not reader:
                return
            self._reader = None
            self._retired.append(reader)
        reader.retire()

    def _say_goodbye(self) -> None:
        self._writer.join()
        with self._lock:
            retired = list(self._retired)
        for reader in retired:
            reader.join()
        self._client.close()


class _Reader:
    """A client of its own for gets, and the thread they run in."""

    def __init__(self, client: MooncakeClient) -> None:
        self.worker = RemoteWorker("mooncake-store-reader")
        self._client = client
        self._held: list[Batch[GetResult]] = []
        self._closer = threading.Thread(target=self._close, name="mooncake-reader-close", daemon=True)

    @property
    def is_closed(self) -> bool:
        """Retired, and gone."""
        return self._closer.ident is not None and not self._closer.is_alive()

    def get(self, batch: Batch[GetResult], pages: Sequence[PageBuffer]) -> None:
        """Fill a batch. In the worker's thread."""
        try:
            self._client.join()
        except MooncakeError as error:
            logger.warning("no reader for the Mooncake store", extra={"why": str(error)})
            return
        for start in range(0, len(pages), MAX_RECORDS):
            if batch.is_cancelled:
                return
            results, is_quiet = self._client.get(pages[start : start + MAX_RECORDS])
            for place, result in enumerate(results, start):
                batch.fill(place, result)
            if not is_quiet:
                batch.hold()
                self._held.append(batch)
                return  # the rest would wait for the same owner

    def retire(self) -> None:
        """Take no more calls; close once the last has returned. Call it once."""
        self.worker.close(0.0)
        self._closer.start()

    def join(self) -> None:
        """Wait for the end, after `retire`."""
        self._closer.join()

    def _close(self) -> None:
        self.worker.join()
        self._client.close()
        for batch in self._held:
            batch.let_go()
