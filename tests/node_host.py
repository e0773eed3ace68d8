"""NodeHost: a node with a real CacheServer, to which the ranks of harnesses attach as workers do.

The server runs in a thread, or in a process that can be killed. Nodes of one network read each other's
arenas; a node's store is where its address says.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cache_service import messages
from cache_service.arena_safety import ArenaSafety
from cache_service.client import CacheClient, ClientSpec, Deadlines, group_of
from cache_service.config import CacheConfig
from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.injected_pages import InjectedOpener, InjectedTransfer, PageInjection
from cache_service.injection import NO_INJECTION, ClientInjection, MessageInjection, Way
from cache_service.keys import PageKey
from cache_service.server_connection import Patience
from cache_service.transfer import Transfer
from tests.unit.cache_nodes import SECRET, TIMEOUT_S, ServerProcess, ServerThread, eventually
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.arena_part import MappedArena
from workers.kvcache.mover import Mover, mover_for
from workers.kvcache.moves import MoveInjection
from workers.parallel import TPGroup

ARENA_GB = 0.002


@dataclass(frozen=True)
class NodeFaults:
    """What goes wrong on purpose on a node, and how long its clients wait; by default nothing, and long."""

    moves: MoveInjection | None = None
    client: ClientInjection = NO_INJECTION
    """Of rank 0; the others only attach."""
    pages: PageInjection | None = None
    """On the wire, and in the store."""
    peers: MessageInjection | None = None
    """Of the server's calls to its peers."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    patience: Patience = field(default_factory=Patience)
    mechanisms: Mechanisms = ALL_ON
    """Of the ranks' movers."""
    safety: ArenaSafety = field(default_factory=ArenaSafety)


NO_FAULTS = NodeFaults()


@dataclass(frozen=True)
class NodePlace:
    """Where the ranks of a group find their node's server."""

    endpoint: str
    incarnation: int
    faults: NodeFaults

    def attach(self, engine: Engine, group: TPGroup) -> tuple[CacheClient, Mover]:
        """Attach this rank's process and have its engine move pages."""
        spec = ClientSpec(
            fingerprint=bytes.fromhex(engine.layout.fingerprint()),
            bundle_bytes=engine.layout.bundle_bytes,
            num_ranks=group.size,
            group=group_of(self.incarnation),
            is_decider=group.rank == 0,
        )
        faults = self.faults
        client = CacheClient(
            self.endpoint,
            SECRET,
            spec,
            deadlines=faults.deadlines,
            patience=faults.patience,
            injection=faults.client if group.rank == 0 else NO_INJECTION,
        )
        client.start(TIMEOUT_S)
        mover = mover_for(
            engine.pool,
            lambda: MappedArena(client.arena, client.leases),
            group.rank,
            group.moves,
            injection=faults.moves,
            mechanisms=faults.mechanisms,
        )
        engine.attach(mover)
        return client, mover


class NodeHost:
    """Use as a context manager. What one harness saved, the next one finds, on this node or on another.

    Its server goes `down` and comes `up` again, with its arena and at its former address: killed, where
    `is_process`, which takes no network.
    """

    def __init__(
        self,
        folder: Path,
        network: InProcessNetwork | None = None,
        store: str | None = None,
        transfer: type[InProcessTransfer] = InProcessTransfer,
        *,
        arena_gb: float = ARENA_GB,
        faults: NodeFaults = NO_FAULTS,
        is_process: bool = False,
    ) -> None:
        assert network is None or not is_process, "a network is within one process"
        folder.mkdir()
        self.has_store = store is not None
        self._folder = folder
        self._network = network
        self._transfer = transfer
        self._faults = faults
        self._is_process = is_process
        self._config = CacheConfig(host_cache_gb=arena_gb, store=store, keep_arena=True)
        self._num_groups = 0
        self._is_up = False
        self._ports: dict[str, int] = {}
        self.up()

    def __enter__(self) -> "NodeHost":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_up:
            self.down()
        shutil.rmtree(self._folder)  # with the arena

    @property
    def endpoint(self) -> str:
        return self._endpoint

    def up(self) -> None:
        """Start the server."""
        pages = self._faults.pages
        opener = {} if pages is None else {"open_store": InjectedOpener(pages)}
        if self._is_process:
            self._process = ServerProcess(self._folder, self._config, **self._ports, **opener)
            self._endpoint, self._ports = self._process.endpoint, self._process.ports
        else:
            self._thread = ServerThread(
                self._folder,
                self._config,
                **self._ports,
                **opener,
                open_transfer=self._open_transfer(),
                peer_injection=self._faults.peers,
                safety=self._faults.safety,
            )
            self._endpoint, self._ports = self._thread.core.endpoint, self._thread.ports
        self._is_up = True

    def down(self) -> None:
        """Kill the server's process, or stop its thread, which leaves the arena as well."""
        self._is_up = False
        if self._is_process:
            self._process.kill()
        else:
            self._thread.stop()

    def stats(self) -> messages.StatsReply:
        """Ask the server for its figures; it also has its store proven right."""
        server = self._process if self._is_process else self._thread
        assert isinstance(server.ask(messages.Check()), messages.Done)
        return server.ask(messages.Stats())

    def peer_messages(self) -> Counter[tuple[Way, str]]:
        """Return what was done to the calls to each peer, by way."""
        peers = self._thread.core._peers.peers
        assert peers is not None
        counts: Counter[tuple[Way, str]] = Counter()
        for source in peers._sources.values():
            injected = source._connection.injected
            counts += injected.counts if injected is not None else Counter()
        return counts

    def place(self, bundle_bytes: int, num_ranks: int) -> NodePlace:
        """Each group of ranks has a number of its own."""
        self._num_groups += 1
        return NodePlace(self._endpoint, self._num_groups, self._faults)

    def cache_of(self, attached: CacheClient) -> CacheClient:
        """Return what the tier of a group asks. It may write, knows the node's pages, and can be read."""
        eventually(lambda: attached.num_grants)
        eventually(lambda: attached.num_known_pages >= self.stats().num_ready)
        if self._network is not None:
            eventually(lambda: self._thread.core._peers.wire.transfer)
        return attached

    def _open_transfer(self) -> Callable[[], Transfer] | None:
        network, injection = self._network, self._faults.pages
        if network is None:
            return None

        def open_transfer() -> Transfer:
            transfer = self._transfer(network, str(self._folder))
            return transfer if injection is None else InjectedTransfer(transfer, injection)

        return open_transfer


def wait_until_remote(client: CacheClient, keys: list[PageKey]) -> None:
    """Wait until the node's store is known to have all these pages."""
    eventually(lambda: all(client.is_remote(key) for key in keys))
