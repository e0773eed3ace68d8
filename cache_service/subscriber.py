"""Subscriber: hears one owner's broadcasts in a thread of its own and keeps a replica of its index true.

Rank 0 of each replica holds one for its node's CacheServer, an API process one for each node's.
"""

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from cache_service.gate import open_client_socket
from cache_service.injection import InjectedSocket, MessageInjection, MessageSocket
from cache_service.publisher import HEARTBEAT_S, SEND_QUEUE_MESSAGES
from cache_service.relocation import Changes, Snapshot, Version
from cache_service.relocation_follower import PATIENCE_S, RelocationFollower, RelocationListener

logger = logging.getLogger(__name__)

RETRY_S = 0.05
MAX_RETRY_S = 2.0

Resync = Callable[[Version | None], Changes | Snapshot | None]
"""Asks the owner for all after a version; None where it did not answer within the function's own deadline."""


class Subscriber:
    """Feeds `listener` until closed, in its own thread; `resync` is called there too and may block."""

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        listener: RelocationListener,
        resync: Resync,
        *,
        clock: Callable[[], float] = time.monotonic,
        injection: MessageInjection | None = None,
    ) -> None:
        self.injected = InjectedSocket(injection, clock) if injection is not None else None
        """For tests only."""
        self.follower = RelocationFollower(listener)
        """Its counters and versions may be read from any thread; its methods are this object's."""
        self.num_failed_resyncs = 0
        self.num_undecodable = 0
        self._endpoint = endpoint
        self._cluster_secret = cluster_secret
        self._resync = resync
        self._clock = clock
        self._decoder = msgspec.msgpack.Decoder(Changes)
        self._seen: deque[Version] = deque(maxlen=64)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relocation-subscriber", daemon=True)
        self._retry_s = RETRY_S
        self._next_resync_s = 0.0

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def saw(self, version: Version) -> None:
        """Take the version that a reply of the owner repeats. Any thread may call it."""
        self._seen.append(version)
        os.eventfd_write(self._wake_fd, 1)

    def redirect(self, endpoint: str) -> None:
        """Listen to a restarted owner's new address. Any thread may call it."""
        self._endpoint = endpoint
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Stop listening; waits for a resync under way. Call it once."""
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(10.0)
        if not self._thread.is_alive():
            os.close(self._wake_fd)

    # In the thread.

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            while not self._closing.is_set():
                try:
                    self._listen(context)
                except Exception:  # the thread's top: a replica that stands still would lie for ever
                    logger.exception("relocation subscriber failed", extra={"endpoint": self._endpoint})
                    self._closing.wait(MAX_RETRY_S)
        finally:
            context.term()

    def _listen(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Hear one endpoint until it changes; zmq reconnects by itself."""
        endpoint = self._endpoint
        socket = open_client_socket(context, zmq.SUB, self._cluster_secret)
        try:
            socket.rcvhwm = SEND_QUEUE_MESSAGES
            socket.subscribe(b"")
            socket.connect(endpoint)
            wire: MessageSocket = socket
            if self.injected is not None:
                self.injected.use(socket)
                wire = self.injected
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake_fd, zmq.POLLIN)
            timeout_s = 0.0
            while not self._closing.is_set() and self._endpoint == endpoint:
                ready = dict(poller.poll(math.ceil(timeout_s * 1000)))
                if self._wake_fd in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                self._hear(wire)
                timeout_s = self._keep_true()
                if self.injected is not None:
                    timeout_s = min(timeout_s, self.injected.wait_s)
        finally:
            socket.close(linger=0)

    def _hear(self, socket: MessageSocket) -> None:
        now_s = self._clock()
        while self._seen:
            self.follower.saw(self._seen.popleft(), now_s)
        for _ in range(SEND_QUEUE_MESSAGES):  # then look whether a resync is due
            try:
                changes = self._decoder.decode(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.MsgspecError:
                self.num_undecodable += 1  # its changes are a gap, which the next message shows
                continue
            self.follower.receive(changes, now_s)

    def _keep_true(self) -> float:
        """Ask the owner where something is missing; return for how long to listen before the next look."""
        now_s = self._clock()
        if not self.follower.needs_resync(now_s):
            return HEARTBEAT_S if self.follower.lag == 0 else PATIENCE_S
        if now_s < self._next_resync_s:
            return self._next_resync_s - now_s
        ticket = self.follower.begin_resync()
        reply = self._resync(self.follower.applied)
        now_s = self._clock()
        if reply is None:
            self.num_failed_resyncs += 1
            self._next_resync_s = now_s + self._retry_s
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
        else:
            self.follower.resynced(reply, ticket, now_s)
            self._next_resync_s = now_s + RETRY_S
            self._retry_s = RETRY_S
        return 0.0
