"""A node with a cache server for tests: in a thread, or in a process of its own that can be killed."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

from cache_service.arena_format import bundle_checksum
from cache_service.client import CacheClient, ClientSpec, Deadlines
from cache_service.config import CacheConfig
from cache_service.one_call import call_once
from cache_service.page_records import Entry
from cache_service.server import CacheServerCore, Place
from cache_service.server_connection import Patience
from tests.unit.arenas import FINGERPRINT, PLENTY, key

SECRET = b"s" * 32
BUNDLE_BYTES = 4096
NUM_SLOTS = 64
CONFIG = CacheConfig(host_cache_gb=72 * BUNDLE_BYTES / 2**30)
"""So many slots, with their headers."""
QUICK = Patience(
    attach_s=2.0,
    reconnect_s=0.02,
    max_reconnect_s=0.1,
    idle_s=0.05,
    max_failures=2,
    retry_s=0.1,
    max_retry_s=0.3,
)
SOON = Deadlines(grant_s=0.3, commit_s=3.0, report_s=1.0, resync_s=1.0)
TIMEOUT_S = 20.0


def eventually(holds, timeout_s=TIMEOUT_S):
    """Wait until `holds()`; return what it returned."""
    end_s = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.005)
    return found


def port_of(endpoint):
    return int(endpoint.rpartition(":")[2])


def make_core(
    folder, config=CONFIG, *, port=None, broadcast_port=None, secret=SECRET, patience_s=5.0, **more
):
    return CacheServerCore(
        config,
        secret,
        Place("127.0.0.1", port, broadcast_port, folder),
        time.time_ns(),
        read_memory=lambda folder: PLENTY,
        patience_s=patience_s,
        **more,
    )


class ServerThread:
    """A server in a thread of this process. Its calls pass through `before_turn`, if a test sets one."""

    def __init__(self, folder, config=CONFIG, **place):
        self.core = make_core(folder, config, **place)
        self.before_turn = None
        serve_calls = self.core._serve_calls
        self.core._serve_calls = lambda: (self.before_turn and self.before_turn()) or serve_calls()
        self.error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.core.run()
        except BaseException as error:
            self.error = error

    def ask(self, request):
        return call_once(self.core.endpoint, SECRET, request, TIMEOUT_S)

    def stop(self):
        self.core.stop()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    @property
    def ports(self):
        return {"port": port_of(self.core.endpoint), "broadcast_port": port_of(self.core.broadcasts)}


@contextlib.contextmanager
def serving(folder, config=CONFIG, **place):
    server = ServerThread(folder, config, **place)
    try:
        yield server
    finally:
        server.stop()


def _serve(folder, config, place, started):
    core = make_core(folder, config, **place)
    started.put((core.endpoint, core.broadcasts))
    core.run()


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, folder, config=CONFIG, **place):
        spawn = multiprocessing.get_context("spawn")
        started = spawn.Queue()
        self.process = spawn.Process(target=_serve, args=(folder, config, place, started), daemon=True)
        self.process.start()
        self.endpoint, self.broadcasts = started.get(timeout=60)

    @property
    def ports(self):
        return {"port": port_of(self.endpoint), "broadcast_port": port_of(self.broadcasts)}

    def ask(self, request):
        return call_once(self.endpoint, SECRET, request, TIMEOUT_S)

    def kill(self):
        self.process.kill()
        self.process.join()

    def pause(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)


def new_client(endpoint, *, start=True, deadlines=SOON, patience=QUICK, **spec):
    spec.setdefault("fingerprint", FINGERPRINT)
    spec.setdefault("group", 7)
    spec.setdefault("num_grants", 8)
    whose = ClientSpec(bundle_bytes=BUNDLE_BYTES, num_ranks=spec.pop("num_ranks", 1), **spec)
    client = CacheClient(endpoint, SECRET, whose, deadlines=deadlines, patience=patience)
    if start:
        client.start(TIMEOUT_S)
    return client


def write(client, page_key, parent=None):
    """Fill a granted slot with a page, as the ranks' movers do; return the entry to commit."""
    grant = eventually(client.take_grant)
    for rank in range(client.arena.spec.num_ranks):
        bundle = client.arena.bundle(grant.slot, rank)
        bundle[:] = page_key * (len(bundle) // len(page_key))
        client.arena.set_checksum(grant.slot, rank, bundle_checksum(bundle, page_key, rank))
    return Entry(grant.slot, grant.epoch, page_key, parent, 16)


def store_keys(client, keys, parent=None):
    """Write and commit pages, each continuing the one before; return where they are said to be."""
    entries = []
    for page_key in keys:
        entries.append(write(client, page_key, parent))
        parent = page_key
    client.commit(entries)
    eventually(lambda: all(client.locate(page_key) for page_key in keys))
    return [client.locate(page_key) for page_key in keys]


def store_chain(client, names, parent=None):
    """Store pages of these names; return their keys, and where they are said to be."""
    keys = [key(name) for name in names]
    return keys, store_keys(client, keys, parent)


def is_intact(client, page_key, location):
    """Read a leased page and see that it is what its key says."""
    return all(
        bytes(client.arena.bundle(location.slot, rank)) == page_key * (BUNDLE_BYTES // 16)
        and bundle_checksum(client.arena.bundle(location.slot, rank), page_key, rank)
        == client.arena.checksum(location.slot, rank)
        for rank in range(client.arena.spec.num_ranks)
    )
