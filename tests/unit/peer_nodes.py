"""Nodes that exchange pages: CacheServers in threads of this process, over a wire that tests can disturb."""

import contextlib
import threading

import msgspec

from cache_service import messages
from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.messages import Fetch, LeasePages, WantedPage
from cache_service.page_records import Entry
from cache_service.peer_source import PeerPatience
from tests.unit.arenas import FINGERPRINT, fill, key
from tests.unit.cache_nodes import BUNDLE_BYTES, CONFIG, ServerThread, eventually
from tests.unit.raw_cache_client import RawClient, commit_chain

QUICK_PEER = PeerPatience(max_failures=2, retry_s=0.05, max_retry_s=0.1)
TIMEOUT_S = 20.0


class SlowNetwork:
    """A reader's view of the network, in which every run waits for `go`."""

    def __init__(self, network, go):
        self._network = network
        self._go = go

    def __getattr__(self, name):
        return getattr(self._network, name)

    def find(self, segment, address, num_bytes):
        found = self._network.find(segment, address, num_bytes)
        assert self._go.wait(TIMEOUT_S)
        return found


class DisturbedTransfer(InProcessTransfer):
    """Bytes move once `go` is set, late if need be; what has been read in time passes through `on_wire`."""

    def __init__(self, network, segment):
        self.go = threading.Event()
        self.go.set()
        self.on_wire = None
        self.num_reads = 0
        super().__init__(SlowNetwork(network, self.go), segment)

    def read(self, segment, runs, timeout_s):
        self.num_reads += 1
        batch = super().read(segment, runs, timeout_s)
        if self.on_wire is not None:
            for run in runs:
                self.on_wire(run.into)
        return batch


class PeerNode:
    """A node with a client that speaks for one worker process."""

    def __init__(
        self,
        network,
        folder,
        name,
        config=CONFIG,
        *,
        transfer=DisturbedTransfer,
        patience=QUICK_PEER,
        **core,
    ):
        self.is_stopped = False
        self.network, self.folder = network, folder
        folder.mkdir(exist_ok=True)
        self.transfers = []

        def open_transfer():
            self.transfers.append(transfer(network, f"{name}-{len(self.transfers)}"))
            return self.transfers[-1]

        self.server = ServerThread(
            folder, config, open_transfer=open_transfer, peer_patience=patience, **core
        )
        self.core = self.server.core
        self.raw = RawClient(self.server)

    @property
    def endpoint(self):
        return self.core.endpoint

    @property
    def transfer(self):
        return self.transfers[-1]

    @property
    def store(self):
        return self.core._arena.store

    @property
    def arena(self):
        return self.core._arena.arena

    def attach(self, **changes):
        """Have an arena, registered with the transfer."""
        answer = self.raw.attach(**changes)
        assert isinstance(answer, messages.Attached), answer
        eventually(lambda: self.core._peers.wire.transfer)
        return self

    def commit(self, names):
        return commit_chain(self.server, self.raw, names)

    def commit_what_fits(self, names):
        """Store a chain, or as much of it as there are slots for."""
        grants = self.raw.ask(messages.GrantSlots(len(names))).grants
        parent, entries = None, []
        for grant, name in zip(grants, names, strict=False):
            fill(self.arena, grant.slot, key(name))
            entries.append(Entry(grant.slot, grant.epoch, key(name), parent, 16))
            parent = key(name)
        return self.raw.ask(messages.Commit(entries)).results

    def stats(self):
        return self.raw.ask(messages.Stats())

    def fetch(self, names, peer, timeout_s=TIMEOUT_S, parent=None):
        """Fetch a chain; return statuses."""
        answer = self.raw.ask(Fetch(chain(names, parent), peer.endpoint, timeout_s))
        return [result.status for result in answer.results]

    def begin_fetch(self, names, peer, timeout_s=TIMEOUT_S):
        """Ask for a chain in a client of its own; return how to wait for the statuses."""
        raw = RawClient(self.server)
        raw.num_calls += 1
        call = messages.Call(raw.num_calls, Fetch(chain(names), peer.endpoint, timeout_s))
        raw.socket.send(msgspec.msgpack.encode(call))

        def wait():
            with raw:
                return [result.status for result in raw.receive(raw.num_calls).results]

        return wait

    def locations(self, names):
        return self.raw.ask(messages.Lookup([key(name) for name in names])).locations

    def holds(self, names):
        """Tell that pages are here with the bytes that their keys say."""
        found = self.locations(names)
        return all(
            location is not None and self.arena.slot_data(location.slot) == key(name) * (BUNDLE_BYTES // 16)
            for name, location in zip(names, found, strict=True)
        )

    def counts(self):
        stats = self.stats()
        return {(count.name, count.reason): count.value for count in stats.counts}

    def check(self):
        assert isinstance(self.raw.ask(messages.Check()), messages.Done)

    def stop(self):
        if self.is_stopped:
            return
        self.is_stopped = True
        for transfer in self.transfers:
            transfer.go.set()
        self.raw.__exit__()
        self.server.stop()


def chain(names, parent=None):
    """Pages to be fetched that continue each other."""
    wanted = []
    for name in names:
        wanted.append(WantedPage(key(name), parent, 16))
        parent = key(name)
    return wanted


def lease(names, incarnation=1, **changes):
    """A peer's question for pages; what its reader is may be changed."""
    fields = {
        "protocol_version": messages.PROTOCOL_VERSION,
        "reader": "10.0.0.9",
        "incarnation": incarnation,
        "fingerprint": FINGERPRINT,
        "bundle_bytes": BUNDLE_BYTES,
        "num_ranks": 1,
        "keys": [key(name) for name in names],
    }
    return LeasePages(**fields | changes)


@contextlib.contextmanager
def two_nodes(folder, owner=None, reader=None):
    """An owner with pages a to e, and a reader without any."""
    network = InProcessNetwork()
    with contextlib.ExitStack() as stack:
        nodes = []
        for name, options in (("owner", owner or {}), ("reader", reader or {})):
            nodes.append(PeerNode(network, folder / name, name, **options))
            stack.callback(nodes[-1].stop)
        nodes[0].attach().commit("abcde")
        nodes[1].attach()
        yield nodes
