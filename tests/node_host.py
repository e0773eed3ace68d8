"""NodeHost: a node with a real CacheServer in a thread, to which the ranks of harnesses attach as workers do.

Nodes of one network read each other's arenas; a node's store is on disk.
"""

from dataclasses import dataclass
from pathlib import Path

from cache_service.client import CacheClient, ClientSpec, group_of
from cache_service.config import CacheConfig
from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.keys import PageKey
from cache_service.transfer import Transfer
from tests.unit.cache_nodes import SECRET, TIMEOUT_S, ServerThread, eventually
from workers.engine.engine import Engine
from workers.kvcache.moves import MoveInjection
from workers.kvcache.page_mover import PageMover
from workers.parallel import TPGroup

ARENA_GB = 0.002


@dataclass(frozen=True)
class NodePlace:
    """Where the ranks of a group find their node's server."""

    endpoint: str
    incarnation: int
    injection: MoveInjection | None

    def attach(self, engine: Engine, group: TPGroup) -> tuple[CacheClient, PageMover]:
        """Attach this rank's process and have its engine move pages."""
        spec = ClientSpec(
            fingerprint=bytes.fromhex(engine.layout.fingerprint()),
            bundle_bytes=engine.layout.bundle_bytes,
            num_ranks=group.size,
            group=group_of(self.incarnation),
            is_decider=group.rank == 0,
        )
        client = CacheClient(self.endpoint, SECRET, spec)
        client.start(TIMEOUT_S)
        mover = PageMover(
            engine.pool, client.arena, client.leases, group.rank, group.moves, injection=self.injection
        )
        engine.attach(mover)
        return client, mover


class NodeHost:
    """Use as a context manager. What one harness saved, the next one finds, on this node or on another."""

    def __init__(
        self,
        folder: Path,
        network: InProcessNetwork | None = None,
        store: str | None = None,
        injection: MoveInjection | None = None,
        transfer: type[InProcessTransfer] = InProcessTransfer,
    ) -> None:
        folder.mkdir()
        self.has_store = store is not None
        self._network = network
        self._injection = injection
        self._num_groups = 0

        def open_transfer() -> Transfer:
            assert network is not None
            return transfer(network, str(folder))

        self.server = ServerThread(
            folder,
            CacheConfig(host_cache_gb=ARENA_GB, store=store),
            open_transfer=None if network is None else open_transfer,
        )

    def __enter__(self) -> "NodeHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    @property
    def endpoint(self) -> str:
        return self.server.core.endpoint

    def place(self, bundle_bytes: int, num_ranks: int) -> NodePlace:
        """Each group of ranks has a number of its own."""
        self._num_groups += 1
        return NodePlace(self.endpoint, self._num_groups, self._injection)

    def cache_of(self, attached: CacheClient) -> CacheClient:
        """Return what the tier of a group asks, once it may write, and others may read its node's arena."""
        eventually(lambda: attached.num_grants)
        if self._network is not None:
            eventually(lambda: self.server.core._peers.wire.transfer)
        return attached


def wait_until_remote(client: CacheClient, keys: list[PageKey]) -> None:
    """Wait until the node's store is known to have all these pages."""
    eventually(lambda: all(client.is_remote(key) for key in keys))
