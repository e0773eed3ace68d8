"""PeerConnection: one thread's calls to a peer's CacheServer, each with a deadline.

A call without an answer ends the connection, and with it whatever the peer has leased to it: an answer that
was lost leases nothing. Each connection has an incarnation of its own, as the peer fences those it has lost.
"""

import math
import time
from collections.abc import Callable

import msgspec
import zmq

from cache_service.connection_loss import NO_RECONNECT_MS, why_lost
from cache_service.gate import open_client_socket
from cache_service.injection import InjectedSocket, MessageInjection, MessageSocket
from cache_service.messages import UNANSWERED, Answer, Call, Reply, Request

_SLICE_S = 0.1
"""For so long at most, a call does not notice that nobody wants its answer any more."""


class PeerLostError(Exception):
    """A peer did not answer; the message says why."""


class PeerConnection:
    """Connects when first asked, and again after a loss. Several calls may be under way. For one thread."""

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        clock: Callable[[], float],
        injection: MessageInjection | None = None,
    ) -> None:
        self.injected = InjectedSocket(injection, clock) if injection is not None else None
        """For tests only: of calls and their answers."""
        self.endpoint = endpoint
        self._cluster_secret = cluster_secret
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._call_id = UNANSWERED
        self._awaited: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._incarnation = time.time_ns()

    def connect(self) -> int:
        """Have a connection; return its incarnation. Raise PeerLostError where there can be none.

        Calls of before, if any, have no answers any more.
        """
        if self._monitor is not None and why_lost(self._monitor) is not None:
            self.drop()
        self._awaited.clear()  # of calls that nobody waits for any more
        self._answers.clear()
        if self._socket is None:
            socket = open_client_socket(self._context, zmq.DEALER, self._cluster_secret)
            socket.reconnect_ivl = NO_RECONNECT_MS
            socket.sndtimeo = 0
            self._socket, self._monitor = socket, socket.get_monitor_socket(zmq.Event.ALL)
            try:
                socket.connect(self.endpoint)
            except zmq.ZMQError as error:
                self.drop()
                raise PeerLostError(f"cannot connect to {self.endpoint}: {error.strerror}") from None
            if self.injected is not None:
                self.injected.use(socket)
        return self._incarnation

    def send(self, request: Request) -> int:
        """Send a call on the connection that `connect` gave, if that still stands; return its number.

        Raises PeerLostError.
        """
        if self._socket is None:
            raise PeerLostError(f"there is no connection to {self.endpoint}")
        self._call_id += 1
        self._awaited.add(self._call_id)
        wire: MessageSocket = self.injected or self._socket
        try:
            wire.send(self._encoder.encode(Call(self._call_id, request)))
        except zmq.ZMQError as error:
            self.drop()
            raise PeerLostError(f"{self.endpoint} cannot be asked: {error.strerror}") from None
        return self._call_id

    def answer(self, call_id: int, end_s: float, is_over: Callable[[], bool]) -> Answer:
        """Return the answer to a call, once; raise PeerLostError where none comes by `end_s`.

        One that came before its connection ended is still there. Once `is_over` it is of no use to anybody.
        """
        if call_id in self._answers:
            return self._answers.pop(call_id)
        socket, monitor = self._socket, self._monitor
        if socket is None or monitor is None or call_id not in self._awaited:
            raise PeerLostError(f"{self.endpoint} was lost before it answered")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        wire: MessageSocket = self.injected or socket
        try:
            while True:
                self._receive(wire)
                if call_id in self._answers:
                    return self._answers.pop(call_id)
                why = why_lost(monitor)
                if why is not None:
                    raise PeerLostError(f"no answer from {self.endpoint}: {why}")
                left_s = end_s - self._clock()
                if left_s <= 0 or is_over():
                    raise PeerLostError(f"{self.endpoint} did not answer in time")
                due_s = self.injected.wait_s if self.injected is not None else math.inf
                poller.poll(max(1, int(min(left_s, due_s, _SLICE_S) * 1000)))
        except msgspec.MsgspecError as error:
            self.drop()
            raise PeerLostError(f"{self.endpoint} speaks another protocol: {error}") from None
        except zmq.ZMQError as error:
            self.drop()
            raise PeerLostError(f"no answer from {self.endpoint}: {error.strerror}") from None
        except PeerLostError:
            self.drop()
            raise

    def tell(self, request: Request) -> None:
        """Send what needs no answer, if there is a connection."""
        if self._socket is not None:
            try:
                self._socket.send(self._encoder.encode(Call(UNANSWERED, request)))
            except zmq.ZMQError:
                self.drop()

    def drop(self) -> None:
        """End the connection; the next call makes another."""
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._socket = self._monitor = None
            self._incarnation = max(time.time_ns(), self._incarnation + 1)
            self._awaited.clear()

    def close(self) -> None:
        """Give everything back."""
        self.drop()
        self._context.term()

    def _receive(self, wire: MessageSocket) -> None:
        """Take all that has come; what was not asked for is a sign of life."""
        while True:
            try:
                reply = self._decoder.decode(wire.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if reply.call_id in self._awaited:
                self._awaited.remove(reply.call_id)
                self._answers[reply.call_id] = reply.answer
