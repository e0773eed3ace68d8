"""FETCH from a peer's arena beside Mooncake's TransferEngine by itself, reading the same pages over loopback.

Either way the bytes go from one process's shared memory into another's. FETCH leases the pages, reads them,
verifies them and commits them, which the reader's client hears. The engine's own call, the arm beside it,
spins while it waits; FETCH sleeps, which on few cores leaves one to the reading.
"""

import mmap
import multiprocessing
import os
import tempfile
import time

from cache_service.arena_files import SHARED_MEMORY
from cache_service.messages import Clear, FetchStatus, WantedPage
from cache_service.mooncake_library import PEER_TO_PEER, MooncakeOptions, address_of, load_engine
from tests.bench.cache_node import TIMEOUT_S, CacheNode, eventually, write_pages
from tests.bench.measuring import Medians, say

OWNER, READER = "127.0.0.1", "127.0.0.2"
PAGE_BYTES = {"1mib": 1 << 20, "360kib": 360 << 10}
"""Of 8 tokens of an 8B model, and of 16 of SmolLM2-135M."""
PAGE_LEN = 16
NUM_PAGES = 128


def measure_wire(rounds):
    """Return fetch_ratio_* and the rates behind them."""
    results = {}
    for name, page_bytes in PAGE_BYTES.items():
        found = _measure(rounds, page_bytes)
        results[f"fetch_ratio_{name}"] = round(found["fetch"] / found["raw"], 3)
        results[f"fetch_gb_s_{name}"] = round(found["fetch"] / 1e9, 2)
        results[f"raw_transfer_gb_s_{name}"] = round(found["raw"] / 1e9, 2)
    return results


def _measure(rounds, page_bytes):
    num_bytes = NUM_PAGES * page_bytes
    found = Medians()
    with _RawOwner(num_bytes) as raw_owner, _Fetches(page_bytes) as fetches:
        raw = _RawReader(raw_owner, page_bytes)
        for round_ in range(-1, rounds):  # the first connects
            arms = {"raw": raw.read, "fetch": fetches.fetch}
            for name in list(arms)[:: 1 if round_ % 2 else -1]:
                seconds = arms[name]()
                if round_ >= 0:
                    found.add(name, num_bytes / seconds)
                say(f"round {round_}: {name} {num_bytes / seconds / 1e9:.2f} GB/s")
    return found


# Ours.


class _Fetches:
    """Two nodes; the reader's arena is emptied after each fetch."""

    def __init__(self, page_bytes):
        self._page_bytes = page_bytes

    def __enter__(self):
        page_bytes = self._page_bytes
        arena_gb = 5 * NUM_PAGES * page_bytes / (1 << 30)  # a fetch may take a quarter of the slots
        self._owner = CacheNode(arena_gb, OWNER, transfer="tcp")
        self._reader = CacheNode(arena_gb, READER, transfer="tcp")
        owner = self._owner.client(page_bytes, 64)
        self._client = self._reader.client(page_bytes, 64)
        entries = write_pages(owner, range(NUM_PAGES), fill=os.urandom(page_bytes))
        owner.commit(entries)
        eventually(lambda: owner.num_known_pages == NUM_PAGES)
        self._clients = [owner, self._client]
        self._wanted = [WantedPage(entry.key, entry.parent, PAGE_LEN) for entry in entries]
        return self

    def fetch(self):
        """Return the seconds from the question to the answer."""
        eventually(lambda: self._client.num_known_pages == 0)
        began_s = time.perf_counter()
        self._client.fetch(self._wanted, self._owner.endpoint, TIMEOUT_S)
        while not (answers := self._client.take_fetched()):
            time.sleep(0.0002)
        seconds = time.perf_counter() - began_s
        outcome = answers[0].outcome
        assert all(result.status is FetchStatus.FETCHED for result in outcome), outcome
        eventually(lambda: self._client.num_known_pages == NUM_PAGES)
        assert self._reader.ask(Clear()).count == NUM_PAGES
        return seconds

    def __exit__(self, *_):
        for client in self._clients:
            client.close()
        for node in (self._owner, self._reader):
            node.__exit__()


# The engine alone.


class _SharedMemory:
    """Registered with an engine, of the kind that arenas lie in."""

    def __init__(self, engine, num_bytes):
        with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            self.view = memoryview(mmap.mmap(file.fileno(), num_bytes))
        self.address = address_of(self.view)
        assert engine.register_memory(self.address, num_bytes) == 0


def _engine(host):
    engine = load_engine(MooncakeOptions(host)).TransferEngine()
    assert engine.initialize(host, PEER_TO_PEER, "tcp", "") == 0
    return engine


def _own(num_bytes, pipe):
    engine = _engine(OWNER)
    memory = _SharedMemory(engine, num_bytes)
    memory.view[:] = os.urandom(num_bytes)
    pipe.send((f"{OWNER}:{engine.get_rpc_port()}", memory.address))
    pipe.recv()


class _RawOwner:
    """A process whose memory is read."""

    def __init__(self, num_bytes):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_own, args=(num_bytes, theirs), daemon=True)

    def __enter__(self):
        self._process.start()
        assert self._pipe.poll(TIMEOUT_S)
        self.segment, self.address = self._pipe.recv()
        return self

    def __exit__(self, *_):
        self._pipe.send(None)
        self._process.join(TIMEOUT_S)


class _RawReader:
    def __init__(self, owner, page_bytes):
        self._engine = _engine(READER)
        self._memory = _SharedMemory(self._engine, NUM_PAGES * page_bytes)
        self._segment = owner.segment
        offsets = range(0, NUM_PAGES * page_bytes, page_bytes)
        self._into = [self._memory.address + offset for offset in offsets]
        self._from = [owner.address + offset for offset in offsets]
        self._lens = [page_bytes] * NUM_PAGES

    def read(self):
        """Return the seconds of one batch."""
        began_s = time.perf_counter()
        code = self._engine.batch_transfer_sync_read(self._segment, self._into, self._from, self._lens)
        assert code == 0, code
        return time.perf_counter() - began_s
