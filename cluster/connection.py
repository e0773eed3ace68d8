"""One replica's wire: owns the ZMQ socket, in a receiver thread of the API process, and decodes off the loop.

One socket is one connection is one Hello: after any loss the socket is replaced, never reused, so nothing
meant for a dead worker reaches its successor.
"""

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import zmq

from cache_service.connection_loss import NO_RECONNECT_MS, why_lost
from cache_service.curve import curve_keys
from workers.protocol import (
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    PROTOCOL_VERSION,
    ClientMessage,
    Hello,
    KVEventBatch,
    LoadReport,
    Refusal,
    RequestOutput,
    Welcome,
    WorkerMessage,
)

logger = logging.getLogger(__name__)

POLL_S = 0.5
RETRY_S = 0.25
MAX_RETRY_S = 8.0


class WrongWorkerError(Exception):
    """Who answers is not who was meant: another replica, or a worker that has read another model."""


class ConnectionListener(Protocol):
    """Who hears of a connection. Every method is called in the receiver thread, one at a time."""

    def opened(self, generation: int, welcome: Welcome) -> None:
        """Take a handshake, the first of this connection or a repeated one with a fresh snapshot.

        Raise WrongWorkerError to turn the worker down.
        """

    def stepped(self, outputs: list[RequestOutput], load: LoadReport, kv_events: KVEventBatch | None) -> bool:
        """Take one step's news; return False to ask for a fresh snapshot (a gap in the events)."""
        ...

    def closed(self, why: str) -> None:
        """Take the loss of a connection that had been opened, or the reason why none opens."""


class Connection:
    """Keeps one worker inbox connected until closed; `move` says which.

    `lease_s` of silence counts as loss: an idle worker speaks several times a second.
    """

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        client_id: str,
        listener: ConnectionListener,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint: str | None = endpoint
        self._hello = msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, client_id))
        self._listener = listener
        self._lease_s = lease_s
        self._clock = clock
        self._server_key = curve_keys(cluster_secret, "server").public
        self._keys = curve_keys(cluster_secret, "client")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(WorkerMessage)
        self._outbox: deque[tuple[int, bytes]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._generation = 0
        self._incarnation: int | None = None
        self._thread = threading.Thread(target=self._run, name="replica-receiver", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def send(self, generation: int, message: ClientMessage) -> None:
        """Queue a message for the connection `opened` under this generation; dropped when that one is gone.

        Any thread may call it.
        """
        self._outbox.append((generation, self._encoder.encode(message)))
        os.eventfd_write(self._wake_fd, 1)

    def move(self, endpoint: str | None) -> None:
        """Leave the worker, if any, for the one at `endpoint`; None: stay alone until the next move.

        Any thread may call it.
        """
        self._endpoint = endpoint
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Disconnect and end the thread; what is queued is sent first. Blocks for a moment; call it once."""
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(5.0)
        os.close(self._wake_fd)

    # In the receiver thread.

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        retry_s = RETRY_S
        try:
            while not self._closing.is_set():
                endpoint = self._endpoint
                if endpoint is None:
                    retry_s = RETRY_S
                    self._pause(MAX_RETRY_S)
                    continue
                self._generation += 1
                try:
                    why = self._serve(context, endpoint)
                except Exception:  # the thread's top: a bug here must end the streams, never hang them
                    logger.exception("replica receiver failed", extra={"endpoint": endpoint})
                    why = "the receiver failed; its log says more"
                was_open = self._incarnation is not None
                retry_s = RETRY_S if was_open else min(2 * retry_s, MAX_RETRY_S)
                self._incarnation = None
                self._outbox.clear()
                if not self._closing.is_set():
                    # A loss is news, the vain attempts after it are not.
                    level = logging.WARNING if was_open else logging.DEBUG
                    logger.log(level, "no replica connection", extra={"endpoint": endpoint, "why": why})
                self._listener.closed(why)
                if self._endpoint == endpoint:
                    self._pause(retry_s)
        finally:
            context.term()

    def _pause(self, timeout_s: float) -> None:
        """Wait, until woken at most."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            os.eventfd_read(self._wake_fd)

    def _serve(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> str:
        """Live through one connection; return why it ended."""
        socket = context.socket(zmq.DEALER)
        socket.reconnect_ivl = NO_RECONNECT_MS
        socket.rcvhwm = 0  # the worker's own bound decides when a slow reader is dropped
        socket.sndhwm = 0
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.curve_serverkey = self._server_key
        socket.curve_publickey = self._keys.public
        socket.curve_secretkey = self._keys.secret
        monitor = socket.get_monitor_socket(zmq.Event.ALL)
        poller = zmq.Poller()
        for source in (socket, monitor, self._wake_fd):
            poller.register(source, zmq.POLLIN)
        try:
            socket.connect(endpoint)
            socket.send(self._hello)
            heard_s = self._clock()
            while not self._closing.is_set():
                ready = dict(poller.poll(int(POLL_S * 1000)))
                why = self._receive(socket)  # before the monitor: a dying worker's last words count
                if why is None and monitor in ready:
                    why = why_lost(monitor)
                if why is None and self._clock() - heard_s > self._lease_s and socket not in ready:
                    why = f"the worker was silent for {self._lease_s:g} s"
                if why is not None:
                    return why
                if socket in ready:
                    heard_s = self._clock()
                if self._wake_fd in ready:
                    os.eventfd_read(self._wake_fd)
                if self._endpoint != endpoint:
                    return "the worker is given up"
                self._flush(socket)
            return "the service closed the connection"
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            # Without a live peer there is nobody to linger for, and libzmq may then wait for ever.
            is_open = self._closing.is_set() and self._incarnation is not None
            socket.close(linger=1000 if is_open else 0)

    def _receive(self, socket: zmq.Socket[bytes]) -> str | None:
        """Handle all that has arrived; return why the connection must end, if so."""
        while True:
            try:
                message = self._decoder.decode(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return None
            except msgspec.MsgspecError as error:
                return f"the worker's message cannot be decoded: {error}"
            if isinstance(message, Refusal):
                return f"the worker refused: {message.reason}"
            if isinstance(message, Welcome):
                try:
                    self._listener.opened(self._generation, message)
                except WrongWorkerError as error:
                    return str(error)
                self._incarnation = message.incarnation
                continue
            if message.incarnation != self._incarnation:
                return f"incarnation {message.incarnation} answers where {self._incarnation} was"
            if not self._listener.stepped(message.outputs, message.load, message.kv_events):
                socket.send(self._hello)

    def _flush(self, socket: zmq.Socket[bytes]) -> None:
        while self._outbox:
            generation, payload = self._outbox.popleft()
            if generation == self._generation:
                socket.send(payload)
