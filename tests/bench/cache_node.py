"""A node's CacheServer in a process of its own, and clients of it, for the benchmarks."""

import multiprocessing
import tempfile
import time
from pathlib import Path

from cache_service.arena_files import SHARED_MEMORY
from cache_service.arena_format import bundle_checksum
from cache_service.client import CacheClient, ClientSpec
from cache_service.config import CacheConfig
from cache_service.messages import Stats
from cache_service.one_call import call_once
from cache_service.page_records import Entry
from cache_service.server import CacheServerCore, Place
from cache_service.transfer_choice import transfer_opener
from tests.unit.arenas import key

SECRET = b"k" * 32
FINGERPRINT = b"a layout to time"
TIMEOUT_S = 60.0


def _serve(config, place, started):
    began_s = time.monotonic()
    open_transfer = transfer_opener(config.transfer, None, place.host)
    core = CacheServerCore(config, SECRET, place, time.time_ns(), open_transfer=open_transfer)
    started.put((core.endpoint, core.broadcasts, time.monotonic() - began_s))
    core.run()


class CacheNode:
    """Use as a context manager. Nodes of one machine differ in `host`, an address of its loopback."""

    def __init__(self, cache_gb, host="127.0.0.1", **options):
        self._config = CacheConfig(host_cache_gb=cache_gb, **options)
        self._host = host
        self._folder = tempfile.TemporaryDirectory(dir=SHARED_MEMORY)
        self._ports = {}
        self.start()

    def start(self):
        """Begin to serve; after `kill`, on the ports of before."""
        spawn = multiprocessing.get_context("spawn")
        started = spawn.Queue()
        place = Place(self._host, folder=Path(self._folder.name), **self._ports)
        self.process = spawn.Process(target=_serve, args=(self._config, place, started), daemon=True)
        self.process.start()
        self.endpoint, self.broadcasts, self.start_s = started.get(timeout=TIMEOUT_S)
        self._ports = {"port": _port(self.endpoint), "broadcast_port": _port(self.broadcasts)}

    def kill(self):
        self.process.kill()
        self.process.join(TIMEOUT_S)

    def anonymous_bytes(self):
        """Memory of the server's own: without what it shares with others, its arena above all."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
        raise OSError("this kernel does not tell RssAnon")

    def ask(self, request):
        return call_once(self.endpoint, SECRET, request, TIMEOUT_S)

    def count(self, name):
        """A counter of the server's, by reason."""
        return {count.reason: count.value for count in self.ask(Stats()).counts if count.name == name}

    def client(self, bundle_bytes, num_grants):
        """Attach, and wait until the arena has all its memory: before that it evicts."""
        spec = ClientSpec(FINGERPRINT, bundle_bytes, 1, group=1, num_grants=num_grants)
        client = CacheClient(self.endpoint, SECRET, spec)
        client.start(TIMEOUT_S)
        eventually(lambda: client.arena.num_usable_slots == client.arena.spec.num_slots)
        return client

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._folder.cleanup()


def _port(endpoint):
    return int(endpoint.rpartition(":")[2])


def eventually(holds, timeout_s=TIMEOUT_S):
    """Wait until `holds()` and return what it returned."""
    end_s = time.monotonic() + timeout_s
    while not (found := holds()):
        if time.monotonic() > end_s:
            raise TimeoutError("it never came to be")
        time.sleep(0.001)
    return found


def write_pages(client, names, parent=None, fill=None):
    """Write pages that continue each other; return what to commit."""
    entries = []
    for name in names:
        grant, page_key = eventually(client.take_grant), key(name)
        bundle = client.arena.bundle(grant.slot, 0)
        if fill is not None:
            bundle[:] = fill
        client.arena.set_checksum(grant.slot, 0, bundle_checksum(bundle, page_key, 0))
        entries.append(Entry(grant.slot, grant.epoch, page_key, parent, 16))
        parent = page_key
    return entries
