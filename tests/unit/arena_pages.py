"""Arenas that answer as a RemoteStore does, for the one contract: of this node, of a peer, over a store.

Pages are put as workers do it and read as they do it; whatever is between is real.
"""

import threading

from cache_service import messages
from cache_service.config import CacheConfig
from cache_service.in_process_transfer import InProcessNetwork
from cache_service.lease_row import LeaseRow
from cache_service.messages import FetchStatus
from cache_service.page_records import CommitStatus, Entry
from cache_service.remote import GetResult, GetStatus, PutStatus, RecordLayout, verify
from cache_service.remote_worker import Batch
from tests.unit.cache_nodes import eventually
from tests.unit.peer_nodes import TIMEOUT_S, PeerNode

ARENA_BYTES = 12 << 20
PART = 512
"""Pages in one call of a worker."""
_STATUS_OF = {
    FetchStatus.MISSING: GetStatus.MISSING,
    FetchStatus.CORRUPT: GetStatus.CORRUPT,
    FetchStatus.TIMED_OUT: GetStatus.TIMED_OUT,
}
_STATUS_OF_COMMIT = {CommitStatus.COMMITTED: PutStatus.STORED, CommitStatus.DUPLICATE: PutStatus.PRESENT}


class Worker:
    """A process that writes and reads the pages of one node, from several threads."""

    def __init__(self, node: PeerNode, layout: RecordLayout):
        self.node = node
        self.lock = threading.Lock()
        attached = self.ask_of_layout(layout)
        self.arena = node.arena
        self.leases = LeaseRow(self.arena, attached.reader_row)

    def ask_of_layout(self, layout):
        answer = self.node.raw.attach(
            fingerprint=layout.fingerprint, bundle_bytes=layout.bundle_bytes, num_ranks=layout.num_ranks
        )
        assert isinstance(answer, messages.Attached), answer
        eventually(lambda: self.node.core._peers.wire.transfer)
        return answer

    def ask(self, request):
        with self.lock:
            return self.node.raw.ask(request)

    def leave(self):
        self.ask(messages.Detach())

    def write(self, pages, tenant=0):
        """Write and commit pages, each a first page; return what became of them."""
        grants = []
        eventually(
            lambda: (
                grants.extend(self.ask(messages.GrantSlots(len(pages) - len(grants))).grants)
                or len(grants) == len(pages)
            )
        )
        entries = []
        for grant, page in zip(grants, pages, strict=True):
            self.arena.slot_data(grant.slot)[:] = page.data
            for rank, checksum in enumerate(page.checksums):
                self.arena.set_checksum(grant.slot, rank, checksum)
            entries.append(Entry(grant.slot, grant.epoch, page.key, None, page.length, tenant))
        return [result.status for result in self.ask(messages.Commit(entries)).results]

    def find(self, keys):
        return self.ask(messages.Lookup(keys)).locations

    def read(self, page, location, layout):
        """Copy a page out of the arena under a lease, and verify it."""
        if location is None or not self.leases.acquire([page.key], [location]):
            return GetResult(GetStatus.MISSING)
        slot = location.slot
        header = GetResult(
            GetStatus.FOUND,
            self.arena.length(slot),
            tuple(self.arena.checksum(slot, rank) for rank in range(layout.num_ranks)),
        )
        page.data[:] = self.arena.slot_data(slot)
        assert self.leases.is_current(location)
        self.leases.release([slot])
        return verify(header, layout, page)


class ArenaPages:
    """Pages are written at one node and read at another, or the same, out of its arena.

    `source` says where a reader fetches from that does not have them: a peer's endpoint, or None for the
    store; `fetches` off: it does not. Before each get a fetching reader's arena is cleared.
    """

    def __init__(
        self, writer: Worker, reader: Worker, layout: RecordLayout, fetches: bool, source: str | None
    ):
        self._writer, self._reader = writer, reader
        self._layout = layout
        self._fetches = fetches
        self._source = source
        self._lengths = {}

    def put(self, pages, timeout_s):
        self._lengths.update((page.key, page.length) for page in pages)
        statuses = []
        for start in range(0, len(pages), PART):
            statuses += self._writer.write(pages[start : start + PART])
            if self._over_store:
                eventually(self._has_put_all)
        return _batch([_STATUS_OF_COMMIT[status] for status in statuses])

    def get(self, pages, timeout_s):
        reader, layout = self._reader, self._layout
        if not self._fetches:
            locations = reader.find([page.key for page in pages])
            return _batch(
                [reader.read(page, where, layout) for page, where in zip(pages, locations, strict=True)]
            )
        reader.ask(messages.Clear())
        results = []
        while len(results) < len(pages):
            rest = pages[len(results) :]
            wanted = self._wanted([page.key for page in rest])
            fetched = reader.ask(messages.Fetch(wanted, self._source, timeout_s)).results
            if self._source is not None:
                fetched = fetched[: _prefix_len(fetched) + 1]  # a peer lends up to the first that misses
            results += [self._result(page, result) for page, result in zip(rest, fetched, strict=False)]
        return _batch(results)

    def remove(self, keys, remove_records):
        """Remove pages everywhere, so that all that know of them learn it."""
        for worker in {self._writer, self._reader}:
            for location in worker.find(keys):
                if location is not None:
                    worker.ask(messages.ReportCorrupt(location, "load"))
        if self._over_store:
            remove_records(keys)
            for worker in {self._writer, self._reader}:
                worker.ask(messages.Fetch(self._wanted(keys), None, TIMEOUT_S))

    def _wanted(self, keys):
        return [messages.WantedPage(key, None, self._lengths.get(key, 0)) for key in keys]

    @property
    def _over_store(self):
        return self._fetches and self._source is None

    def _has_put_all(self):
        attached = self._writer.node.core._remote.source
        return attached.num_waiting == 0 and attached.wait_until_quiet(0.0)

    def _result(self, page, fetched):
        if fetched.location is None:
            return GetResult(_STATUS_OF.get(fetched.status, GetStatus.FAILED))
        return self._reader.read(page, fetched.location, self._layout)


class ArenaHarness:
    """`num_nodes` 2: the second reads what the first has. `store`: behind both, and nothing between them;
    `remove_records` takes pages out of it.
    """

    def __init__(self, folder, num_nodes=1, store=None, remove_records=None, **options):
        self._remove_records = remove_records
        self.has_store = store is not None
        network = InProcessNetwork()
        config = CacheConfig(host_cache_gb=ARENA_BYTES / 2**30, store=store, **options)
        self.nodes = [
            PeerNode(network, folder / f"node-{number}", f"node-{number}", config)
            for number in range(num_nodes)
        ]
        self.workers = []

    def open(self, layout):
        for worker in self.workers:
            worker.leave()
        self.workers = [Worker(node, layout) for node in self.nodes]
        for worker in self.workers:
            arena = worker.arena
            eventually(lambda arena=arena: arena.num_usable_slots == arena.spec.num_slots)
        if self.has_store:
            for node in self.nodes:
                eventually(lambda node=node: node.core._remote.source)
        writer, reader = self.workers[0], self.workers[-1]
        has_peer = writer is not reader and not self.has_store
        source = self.nodes[0].endpoint if has_peer else None
        self._pages = ArenaPages(writer, reader, layout, has_peer or self.has_store, source)
        return self._pages

    def remove(self, keys):
        self._pages.remove(keys, self._remove_records)

    def memory(self, num_bytes):
        return memoryview(bytearray(num_bytes))

    def close(self):
        for node in self.nodes:
            if self.workers:
                node.check()
            node.stop()


def _prefix_len(fetched):
    return next((place for place, result in enumerate(fetched) if result.location is None), len(fetched))


def _batch(results):
    batch = Batch(len(results))
    for place, result in enumerate(results):
        batch.fill(place, result)
    batch.end()
    batch.finish(None)
    return batch
