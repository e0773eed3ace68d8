"""Nodes in processes of their own fetch over Mooncake's TCP: whole pages, a killed peer, one that hangs."""

import multiprocessing
import threading
import time

import pytest

from cache_service import messages
from cache_service.client import CacheClient, ClientSpec
from cache_service.config import CacheConfig
from cache_service.messages import Fetch, FetchStatus
from tests.unit.arenas import FINGERPRINT, key
from tests.unit.cache_nodes import (
    QUICK,
    SOON,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    make_core,
    write,
)
from tests.unit.mooncake_master import has_mooncake
from tests.unit.peer_nodes import chain

if not has_mooncake():
    pytest.skip("Mooncake cannot be imported: no wheel or no libibverbs1", allow_module_level=True)

from cache_service.transfer_choice import transfer_opener

pytestmark = pytest.mark.slow  # hung peers and Mooncake's own deadlines: mostly waiting

PAGE_BYTES = 1 << 20
NUM_PAGES = 192
CONFIG = CacheConfig(host_cache_gb=(4 * NUM_PAGES + 2) * PAGE_BYTES / 2**30)
"""A quarter of the slots can be on their way, or lent, at once."""
FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus
NAMES = [str(number) for number in range(NUM_PAGES)]


def serve(folder, place, started):
    core = make_core(folder, CONFIG, open_transfer=transfer_opener("tcp", None, "127.0.0.1"), **place)
    started.put((core.endpoint, core.broadcasts))
    core.run()


class Node(ServerProcess):
    """A node that can be killed, and a client of it in this process."""

    def __init__(self, folder, group, **place):
        folder.mkdir(exist_ok=True)
        self.folder, self.group = folder, group
        spawn = multiprocessing.get_context("spawn")
        started = spawn.Queue()
        self.process = spawn.Process(target=serve, args=(folder, place, started), daemon=True)
        self.process.start()
        self.endpoint, self.broadcasts = started.get(timeout=60)
        spec = ClientSpec(FINGERPRINT, PAGE_BYTES, 1, group=group)
        self.client = CacheClient(self.endpoint, b"s" * 32, spec, deadlines=SOON, patience=QUICK)
        self.client.start(TIMEOUT_S)

    def store(self, names):
        parent = None
        for start in range(0, len(names), 16):
            entries = []
            for name in names[start : start + 16]:
                entries.append(write(self.client, key(name), parent))
                parent = key(name)
            self.client.commit(entries)
        eventually(lambda: all(self.client.locate(key(name)) for name in names))

    def fetch(self, names, peer, timeout_s=TIMEOUT_S):
        """Fetch a chain; return statuses."""
        answer = self.ask(Fetch(chain(names), peer.endpoint, timeout_s))
        return [result.status for result in answer.results]

    def begin_fetch(self, names, peer, timeout_s=TIMEOUT_S):
        """Fetch in a thread; return how to wait for the statuses."""
        found = []
        thread = threading.Thread(target=lambda: found.extend(self.fetch(names, peer, timeout_s)))
        thread.start()

        def wait():
            thread.join(2 * TIMEOUT_S)
            return found

        return wait

    def stats(self):
        return self.ask(messages.Stats())

    def holds(self, names):
        """Tell that pages are in this node's arena with the bytes that their keys say."""
        locations = eventually(
            lambda: (
                (found := [self.client.locate(key(name)) for name in names]) and None not in found and found
            )
        )
        return all(
            self.client.arena.slot_data(location.slot) == key(name) * (PAGE_BYTES // 16)
            for name, location in zip(names, locations, strict=True)
        )

    def close(self):
        self.client.close()
        self.kill()


@pytest.fixture
def nodes(tmp_path):
    owner, reader = Node(tmp_path / "owner", 7), Node(tmp_path / "reader", 8)
    owner.store(NAMES)
    # Their memory is prefaulted and registered in the background.
    arena = reader.client.arena
    eventually(lambda: arena.num_usable_slots == arena.spec.num_slots)
    eventually(lambda: reader.fetch(NAMES[:1], owner) in ([FETCHED], [PRESENT]))
    yield owner, reader
    owner.close()
    reader.close()


def test_pages_come_over_tcp_as_they_are(nodes):
    owner, reader = nodes
    assert reader.fetch(NAMES, owner) == [PRESENT] + [FETCHED] * (NUM_PAGES - 1)
    assert reader.holds(NAMES)
    stats = reader.stats()
    counts = {(count.name, count.reason): count.value for count in stats.counts}
    assert counts["fetch_bytes", "peer"] == NUM_PAGES * PAGE_BYTES
    assert (stats.num_peers, stats.num_peers_avoided) == (1, 0)
    assert owner.stats().num_lent == 0


def test_a_peer_killed_while_it_is_read_is_a_failure_and_its_heir_is_read(nodes):
    owner, reader = nodes
    wait = reader.begin_fetch(NAMES, owner)
    eventually(lambda: owner.stats().num_lent)
    owner.kill()
    statuses = wait()
    num_held = sum(status in (FETCHED, PRESENT) for status in statuses)
    assert statuses == [PRESENT] + [FETCHED] * (num_held - 1) + [FAILED] * (NUM_PAGES - num_held)
    assert reader.holds(NAMES[:num_held])
    eventually(lambda: reader.stats().num_lingering == 0)
    assert reader.ask(messages.Check()) == messages.Done(num_held)
    ports, client = owner.ports, owner.client
    owner.__init__(owner.folder, owner.group, **ports)
    client.close()
    assert owner.stats().num_ready == NUM_PAGES, "it has taken the pages over"
    eventually(lambda: set(reader.fetch(NAMES, owner)) <= {FETCHED, PRESENT})
    assert reader.holds(NAMES)


def test_a_peer_that_hangs_is_given_up_in_time_and_asked_again_later(nodes):
    owner, reader = nodes
    owner.pause()
    try:
        began_s = time.monotonic()
        assert set(reader.fetch(NAMES[1:20], owner, 1.0)) <= {TIMED_OUT, FAILED, MISSING}
        wait = reader.begin_fetch(NAMES, owner, 1.0)
        assert wait()[1:] == [TIMED_OUT] * (NUM_PAGES - 1)
        assert time.monotonic() - began_s < TIMEOUT_S / 2
        assert reader.ask(messages.Check()) == messages.Done(1)
    finally:
        owner.resume()
    eventually(lambda: reader.stats().num_lingering == 0)
    eventually(lambda: set(reader.fetch(NAMES, owner)) <= {FETCHED, PRESENT})
    assert reader.holds(NAMES)
