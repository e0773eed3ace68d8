"""CacheServerCore: serves one node's arena: grants, commits, evicts, answers calls, broadcasts relocations.

One thread runs it and alone allocates and frees slots (I7). Workers copy by themselves; no page passes
through here. No Ray: `server_actor` gives it a process.
"""

import contextlib
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from cache_service.answers import Answers
from cache_service.arena_files import SHARED_MEMORY, arena_path
from cache_service.arena_safety import ArenaSafety
from cache_service.config import CacheConfig
from cache_service.fetcher import Fetcher, Source
from cache_service.gate import Gate, bind
from cache_service.host_memory import HostMemory
from cache_service.identity import cluster_id_of
from cache_service.inbox import Inbox
from cache_service.injection import MessageInjection
from cache_service.messages import UNANSWERED, Answer, Call, Done, Refused, Reply, StatsReply
from cache_service.native.fence import load_full_fence
from cache_service.node_arena import PATIENCE_S, NodeArena
from cache_service.peer_exchange import PeerExchange
from cache_service.peer_source import PeerPatience
from cache_service.publisher import Publisher
from cache_service.remote_tier import OpenStore, RemoteTier
from cache_service.store_address import open_store
from cache_service.wire import OpenTransfer

logger = logging.getLogger(__name__)

MAX_CALLS_PER_TURN = 256
"""Then the changes go out, and the dead are looked for."""
MAX_EVICTIONS_PER_TURN = 256
IDLE_S = 0.1
LOOK_S = 1.0
"""Between two looks at the lease bytes."""
THREADS_END_S = 2.0
"""Longer ones are left to the process's end."""


@dataclass(frozen=True)
class Place:
    """Where a server binds and where its arena lies."""

    host: str
    """The node's address, the one that peers use."""
    port: int | None = None
    """None: any free one; a restarted server takes its former ports, so that clients find it again."""
    broadcast_port: int | None = None
    folder: Path = SHARED_MEMORY


class CacheServerCore:
    """Made in one thread, `run` in another (or the same); `stop`, `stats` and `turn_s` may be called by any.

    `incarnation` has to differ from that of any former server of the node: nanoseconds of the clock do.
    Without `open_transfer` it neither lends pages to peers nor fetches from them. Raises BindError,
    ArenaOwnedError, ArenaSizeError, TransferError, NativeBuildError.
    """

    def __init__(
        self,
        config: CacheConfig,
        cluster_secret: bytes,
        place: Place,
        incarnation: int,
        *,
        read_memory: Callable[[Path], HostMemory] = HostMemory.read,
        patience_s: float = PATIENCE_S,
        safety: ArenaSafety | None = None,
        open_transfer: OpenTransfer | None = None,
        peer_patience: PeerPatience | None = None,
        peer_injection: MessageInjection | None = None,
        open_store: OpenStore = open_store,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        load_full_fence()  # it may have to be compiled first, which is not to keep a worker waiting
        self._config = config
        self._clock = clock
        self._decoder = msgspec.msgpack.Decoder(Call)
        self._encoder = msgspec.msgpack.Encoder()
        self._is_stopping = False
        self._turned_s = self._next_look_s = clock()
        cluster_id = cluster_id_of(cluster_secret)
        self._arena = NodeArena(
            config,
            cluster_id,
            arena_path(cluster_id, place.host, place.folder),
            incarnation,
            now_s=clock(),
            read_memory=read_memory,
            patience_s=patience_s,
            safety=safety,
        )
        counts: Counter[tuple[str, str]] = Counter()
        with contextlib.ExitStack() as undo:
            undo.callback(self._arena.close, config.keep_arena)
            self._inbox = Inbox()
            undo.callback(self._inbox.close)
            self._gate = Gate(cluster_secret)
            undo.callback(self._gate.close)
            self._socket = self._gate.open_socket(zmq.ROUTER)
            undo.callback(self._socket.close)
            self._socket.router_mandatory = True  # a send to a client that left fails instead of vanishing
            self.endpoint = bind(self._socket, place.host, place.port)
            self._peers = PeerExchange(
                place.host,
                cluster_secret,
                self._inbox,
                open_transfer,
                counts,
                self._keep_alive,
                patience=peer_patience,
                injection=peer_injection,
                clock=clock,
            )
            undo.callback(self._peers.close)
            self._publisher = Publisher(
                self._gate, place.host, self._arena.log, now_s=clock(), port=place.broadcast_port
            )
            undo.pop_all()
        self._arena.announce(int(self.endpoint.rpartition(":")[2]))
        self._fetcher = Fetcher(self._inbox, self._source, counts, clock=clock)
        self._remote = RemoteTier(
            config.store, place.host, self._inbox, self._arena.log, counts, open_store=open_store, clock=clock
        )
        for user in (self._fetcher, self._remote):
            self._arena.enlist(user)
        self._peers.enlist(self._arena)
        self._answers = Answers(
            self._arena, cluster_id, self.broadcasts, self._fetcher, self._remote, self._peers, counts
        )
        self._stats = self._answers.stats()

    @property
    def broadcasts(self) -> str:
        """The publisher's endpoint."""
        return self._publisher.endpoint

    def run(self) -> None:
        """Serve until `stop`, then give everything back.

        What it raises is a bug: the arena is left to the next server, as by one that was killed.
        """
        poller = zmq.Poller()
        for source in (self._socket, self._gate.admissions, self._inbox.descriptor):
            poller.register(source, zmq.POLLIN)
        has_more = False
        try:
            while not self._is_stopping:
                poller.poll(0 if has_more else math.ceil(self._idle_s() * 1000))
                self._gate.admit()
                self._inbox.run()
                has_more = self._serve_calls()
                has_more |= self._keep_house()
                self._publisher.flush(self._clock())
        except BaseException:
            self._arena.leave()
            raise
        else:
            self._arena.close(self._config.keep_arena)
        finally:
            self._fetcher.close(THREADS_END_S)
            self._remote.close(THREADS_END_S)
            self._peers.close()
            self._inbox.close()
            self._publisher.close()
            self._socket.close(linger=0)
            self._gate.close()

    def stop(self) -> None:
        """Make `run` return soon."""
        self._is_stopping = True

    def stats(self) -> StatsReply:
        """Return figures at most `LOOK_S` old."""
        return self._stats

    def turn_s(self) -> float:
        """Return how long ago the last turn began."""
        return self._clock() - self._turned_s

    def _serve_calls(self) -> bool:
        """Answer what has arrived; tell whether more may be waiting."""
        for _ in range(MAX_CALLS_PER_TURN):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                call = self._decoder.decode(b"".join(frames))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                # Its text names a field's path and types, never its value.
                refusal = self._answers.refuse("undecodable", f"cannot decode the call: {error}")
                self._reply(identity, UNANSWERED, refusal)
                continue
            reply = functools.partial(self._reply, identity, call.call_id)
            answer = self._answers.answer(identity, call.request, self._clock(), reply)
            if answer is not None:
                reply(answer)
        return True

    def _keep_house(self) -> bool:
        """Do what no call asks for; tell whether there is more of it."""
        now_s = self._turned_s = self._clock()
        self._answers.reclaim()
        self._fetcher.tick(now_s)
        self._peers.tick(now_s)
        has_more = self._remote.tick(now_s)
        store, ages, rows = self._arena.store, self._arena.ages, self._arena.rows
        num_evicted = store.maintain(MAX_EVICTIONS_PER_TURN) if store is not None else 0
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            if ages is not None and rows is not None:
                ages.look(rows.used_rows, now_s)
            self._stats = self._answers.stats()
        return has_more or num_evicted == MAX_EVICTIONS_PER_TURN

    def _idle_s(self) -> float:
        """Return how long to wait for calls before something else is due."""
        deadline_s = self._fetcher.next_deadline_s
        return IDLE_S if deadline_s is None else min(IDLE_S, max(0.0, deadline_s - self._clock()))

    def _source(self, peer: str | None) -> Source | None:
        """Return whom to ask for pages."""
        if peer is None:
            return self._remote.source
        return None if peer == self.endpoint else self._peers.source(peer)

    def _keep_alive(self, identity: bytes) -> bool:
        """Write to a connection; tell whether it is there."""
        return self._send(identity, Reply(UNANSWERED, self._arena.log.version, Done()))

    def _reply(self, identity: bytes, call_id: int, answer: Answer) -> None:
        if call_id == UNANSWERED and not isinstance(answer, Refused):
            return
        if not self._send(identity, Reply(call_id, self._arena.log.version, answer)):
            self._answers.lost(identity)

    def _send(self, identity: bytes, reply: Reply) -> bool:
        """Write to a connection; False where it is closed."""
        try:
            self._socket.send_multipart([identity, self._encoder.encode(reply)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            if error.errno != zmq.EAGAIN:
                raise
            self._answers.forget(identity)  # it does not read; it attaches again if it lives
        return True
