"""PeerExchange: pages between this node and its peers: those lent, those fetched, the wire between them.

Made, ticked and closed by the server's thread.
"""

from collections import Counter
from collections.abc import Callable

from cache_service.inbox import Inbox
from cache_service.injection import MessageInjection
from cache_service.node_arena import NodeArena
from cache_service.peer_source import PeerPatience, PeerSource
from cache_service.peers import Peers
from cache_service.remote_leases import RemoteLeases
from cache_service.wire import OpenTransfer, Wire


class PeerExchange:
    """`node` is this server's address; without `open_transfer` nothing is lent or fetched.

    `keep_alive` writes to a connection and tells whether it is still there. Raises TransferError.
    """

    def __init__(
        self,
        node: str,
        cluster_secret: bytes,
        inbox: Inbox,
        open_transfer: OpenTransfer | None,
        counts: Counter[tuple[str, str]],
        keep_alive: Callable[[bytes], bool],
        *,
        patience: PeerPatience | None = None,
        injection: MessageInjection | None = None,
        clock: Callable[[], float],
    ) -> None:
        self.wire = Wire(open_transfer, inbox) if open_transfer is not None else None
        self.peers = Peers(self.wire, node, cluster_secret, patience, injection, clock) if self.wire else None
        self.leases = RemoteLeases(self.wire, counts, keep_alive)

    @property
    def num_peers(self) -> int:
        """Peers that pages are fetched from."""
        return 0 if self.peers is None else self.peers.states().total()

    @property
    def num_avoided(self) -> int:
        """Those of them that have failed and are left alone for a while."""
        return 0 if self.peers is None else self.num_peers - self.peers.states()["closed"]

    def enlist(self, arena: NodeArena) -> None:
        """Use the arena from now on; the wire is the first to end, so that no read goes on."""
        arena.enlist(self.leases)
        if self.peers is not None and self.wire is not None:
            arena.enlist(self.peers)
            arena.enlist(self.wire)

    def source(self, endpoint: str) -> PeerSource | None:
        """Return the peer to fetch from; None where that cannot be."""
        return None if self.peers is None else self.peers.find(endpoint)

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        self.leases.tick(now_s)
        if self.peers is not None:
            self.peers.tick(now_s)

    def close(self) -> None:
        """Give the wire back, after the arena's end."""
        if self.wire is not None:
            self.wire.close()
