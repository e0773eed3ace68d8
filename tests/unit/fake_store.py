"""A RemoteStore in memory that fails, hangs and forgets as a test wants; and one address for it."""

import threading

from cache_service.remote import (
    GetResult,
    GetStatus,
    PutStatus,
    RecordLayout,
    RemoteStats,
    pack_header,
    read_header,
    run_get,
    run_put,
    verify,
)
from cache_service.remote_worker import RemoteWorker
from cache_service.store_address import StoreOpenError

ADDRESS = "disk:/store-of-a-test?gb=1"
HANG_S = 60.0


class FakeStore:
    """`records` outlive it when they are given to the next one."""

    def __init__(self, layout: RecordLayout, records=None):
        self.stats = RemoteStats()
        self.records = {} if records is None else records
        self.put_keys = []
        """In the order they came."""
        self.status = None
        """Of every put, instead of the right one."""
        self.is_deaf = False
        """Gets fail."""
        self.goes_on = threading.Event()
        """Cleared: puts and gets hang until it is set, or the store is closed."""
        self.goes_on.set()
        self.hanging = threading.Semaphore(0)
        """Released by each call that hangs."""
        self.batch_sizes = []
        self.lingers = False
        """Batches of puts are not quiet when they end, but once they are let go."""
        self.lingering = []
        self.is_closed = False
        self._layout = layout
        self._writer, self._reader = RemoteWorker("fake-writer"), RemoteWorker("fake-reader")

    def put(self, pages, timeout_s):
        self.batch_sizes.append(len(pages))

        def work(batch):
            self._wait()
            for place, page in enumerate(pages):
                if not batch.is_cancelled and not self.is_closed:
                    batch.fill(place, self._put(page))
            if self.lingers:
                batch.hold()
                self.lingering.append(batch)

        return run_put(self._writer, work, pages, timeout_s)

    def get(self, pages, timeout_s):
        def work(batch):
            self._wait()
            for place, page in enumerate(pages):
                if not batch.is_cancelled and not self.is_closed and not self.is_deaf:
                    batch.fill(place, self._get(page))

        return run_get(self._reader, work, pages, timeout_s)

    def known_keys(self):
        return list(self.records)

    def close(self, timeout_s):
        self.is_closed = True
        self.goes_on.set()
        return self._writer.close(timeout_s) & self._reader.close(timeout_s)

    def _wait(self):
        if not self.goes_on.is_set():
            self.hanging.release()
            self.goes_on.wait(HANG_S)

    def _put(self, page):
        if self.status is not None:
            if self.status is not PutStatus.STORED:
                self.stats.count_failure("put: as the test wants")
            return self.status
        self.put_keys.append(page.key)
        if page.key in self.records:
            return PutStatus.PRESENT
        self.records[page.key] = (pack_header(self._layout, page), bytes(page.data))
        return PutStatus.STORED

    def _get(self, page):
        if page.key not in self.records:
            return GetResult(GetStatus.MISSING)
        header, data = self.records[page.key]
        page.data[:] = data
        return verify(read_header(header, self._layout, page.key), self._layout, page)


class FakeOpener:
    """Opens FakeStores over the same records, as often as it is asked; keep `stores` to look at them."""

    def __init__(self):
        self.stores = []
        self.records = {}
        self.error = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.asked = []

    def __call__(self, address, layout, memory, node):
        self.asked.append((address, layout, memory.nbytes, node))
        self.goes_on.wait(HANG_S)
        if self.error is not None:
            raise StoreOpenError(self.error)
        self.stores.append(FakeStore(layout, self.records))
        return self.stores[-1]

    @property
    def store(self):
        return self.stores[-1]
