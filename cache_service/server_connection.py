"""ServerConnection: one process's calls to its node's CacheServer, each with a deadline, behind a breaker.

Owns an IO thread and the DEALER in it. One socket is one connection is one Attach: after a loss the socket is
replaced, and calls that wait for an answer go out again once the server has taken the process back.
"""

import itertools
import logging
import math
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import zmq

from cache_service.breaker import Breaker
from cache_service.connection_loss import NO_RECONNECT_MS, why_lost
from cache_service.gate import open_client_socket
from cache_service.injection import InjectedSocket, MessageInjection, MessageSocket
from cache_service.messages import (
    UNANSWERED,
    Answer,
    Attach,
    Attached,
    Call,
    GrantSlots,
    Lookup,
    Refused,
    Reply,
    Request,
)
from cache_service.relocation import Version

logger = logging.getLogger(__name__)

FailureReason = Literal["timeout", "breaker_open", "refused", "connection_lost", "closed"]
"""Why a call has no answer: none came in time; none was hoped for; the server said no; the server may have
done it before it was lost, and it must not be done twice; the client is closed."""

_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class CallFailure:
    """A call came to nothing; the caller takes it for a miss."""

    reason: FailureReason
    text: str = ""
    """What the server said to it."""


@dataclass(frozen=True)
class Patience:
    """How long a client waits, and when it gives up for a while."""

    attach_s: float = 5.0
    """For the answer to an Attach; then the socket is replaced."""
    reconnect_s: float = 0.05
    max_reconnect_s: float = 1.0
    idle_s: float = 0.25
    """Between two looks at what is due, while nothing is under way."""
    max_failures: int = 3
    """Calls in a row that time out before the breaker opens."""
    retry_s: float = 0.25
    max_retry_s: float = 2.0


class ConnectionListener(Protocol):
    """Who uses a connection. Every method is called in the IO thread, one at a time."""

    def attached(self, answer: Attached, version: Version) -> str | None:
        """Take the server's answer to an Attach; return why it is of no use, if so: it is asked again."""
        ...

    def refused(self, refusal: Refused) -> None:
        """Take the server's refusal to attach; it is asked again."""

    def replied(self, version: Version) -> None:
        """Take the version that an answer repeats."""

    def unclaimed(self, answer: Answer) -> None:
        """Take an answer whose call has timed out."""

    def tick(self, now_s: float) -> None:
        """Do what is due; called every `idle_s` and after each batch of answers, while attached."""


@dataclass
class _Pending:
    """A call without an answer yet."""

    request: Request
    deadline_s: float
    done: Callable[[Answer | CallFailure], None]


class ServerConnection:
    """`ask` and `tell` from any thread. `stats` counts calls by (kind, how they ended)."""

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        attach: Attach,
        listener: ConnectionListener,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        injection: MessageInjection | None = None,
    ) -> None:
        self.injected = InjectedSocket(injection, clock) if injection is not None else None
        """For tests only."""
        self.breaker = Breaker(patience.max_failures, patience.retry_s, patience.max_retry_s)
        self.is_attached = False
        self.num_lost = 0
        """Connections lost after the server had taken the process in."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """By kind of request, and `answered` or the FailureReason. The IO thread writes it."""
        self.endpoint = endpoint
        self._cluster_secret = cluster_secret
        self._attach = attach
        self._listener = listener
        self._patience = patience
        self._clock = clock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._outbox: deque[_Pending] = deque()
        self._pending: dict[int, _Pending] = {}
        self._call_ids = itertools.count(UNANSWERED + 1)
        self._attach_id = UNANSWERED
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-client", daemon=True)

    @property
    def is_healthy(self) -> bool:
        """Tell whether the server answers, or may be back within its breaker's patience."""
        return self.breaker.state == "closed" and not self._closing.is_set()

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def ask(self, request: Request, timeout_s: float, done: Callable[[Answer | CallFailure], None]) -> None:
        """Send a call; `done` gets what comes of it, once, in the IO thread. Never blocks."""
        if self._closing.is_set():
            done(CallFailure("closed"))
            return
        self._outbox.append(_Pending(request, self._clock() + timeout_s, done))
        self.wake()

    def ask_and_wait(self, request: Request, timeout_s: float) -> Answer | CallFailure:
        """Send a call and wait for what comes of it; not in the IO thread."""
        result: Future[Answer | CallFailure] = Future()
        self.ask(request, timeout_s, result.set_result)
        try:
            return result.result(timeout_s + self._patience.idle_s + 1.0)
        except TimeoutError:  # the IO thread is gone, or late by a second
            return CallFailure("timeout")

    def wake(self) -> None:
        """Have `tick` called soon."""
        if not self._closing.is_set():
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """End the thread and fail what is under way. Call it once."""
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._wake_fd)
            self._end_all()  # what was asked for at the last moment

    # In the IO thread.

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pause_s = self._patience.reconnect_s
        try:
            while not self._closing.is_set():
                try:
                    why = self._live(context)
                except Exception:  # the thread's top: calls must end, whatever happens here
                    logger.exception("cache client failed", extra={"endpoint": self.endpoint})
                    why = "the client failed; its log says more"
                was_attached, self.is_attached = self.is_attached, False
                if self._closing.is_set():
                    return
                if was_attached:
                    self.num_lost += 1
                    pause_s = self._patience.reconnect_s
                    logger.warning("lost the cache server", extra={"endpoint": self.endpoint, "why": why})
                self._lose_calls()
                self._rest(pause_s)
                pause_s = min(2 * pause_s, self._patience.max_reconnect_s)
        finally:
            context.term()
            self._end_all()

    def _live(self, context: zmq.Context[zmq.Socket[bytes]]) -> str:
        """Live through one connection; return why it ended."""
        socket = open_client_socket(context, zmq.DEALER, self._cluster_secret)
        socket.reconnect_ivl = NO_RECONNECT_MS
        monitor = socket.get_monitor_socket(zmq.Event.ALL)
        poller = zmq.Poller()
        for source in (socket, monitor, self._wake_fd):
            poller.register(source, zmq.POLLIN)
        wire: MessageSocket = socket
        if self.injected is not None:
            self.injected.use(socket)
            wire = self.injected
        try:
            socket.connect(self.endpoint)
            self._attach_id = next(self._call_ids)
            wire.send(self._encoder.encode(Call(self._attach_id, self._attach)))
            give_up_s = self._clock() + self._patience.attach_s
            while not self._closing.is_set():
                look_s = min(self._next_look_s(), self.injected.wait_s if self.injected else math.inf)
                ready = dict(poller.poll(math.ceil(look_s * 1000)))
                if self._wake_fd in ready:
                    os.eventfd_read(self._wake_fd)
                why = self._receive(wire)
                if why is None and monitor in ready:
                    why = why_lost(monitor)
                if why is None and not self.is_attached and self._clock() > give_up_s:
                    why = f"the server did not take this process in within {self._patience.attach_s:g} s"
                if why is not None:
                    return why
                sendable = self._take_calls()
                if self.is_attached:
                    self._send(wire, sendable)
                    self._listener.tick(self._clock())
            return "the client is closed"
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    def _rest(self, pause_s: float) -> None:
        """Be without a connection for a while; deadlines go on."""
        end_s = self._clock() + pause_s
        while not self._closing.is_set() and (left_s := end_s - self._clock()) > 0:
            self._take_calls()
            readable, _, _ = select.select([self._wake_fd], [], [], min(self._next_look_s(), left_s))
            if readable:
                os.eventfd_read(self._wake_fd)

    def _next_look_s(self) -> float:
        """Return how long to wait for news before some deadline has to be looked at."""
        now_s = self._clock()
        next_s = min((pending.deadline_s for pending in self._pending.values()), default=math.inf)
        return min(max(next_s - now_s, 0.0), self._patience.idle_s)

    def _receive(self, socket: MessageSocket) -> str | None:
        """Handle all that has arrived; return why the connection must end, if so."""
        while True:
            try:
                reply = self._decoder.decode(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return None
            except msgspec.MsgspecError as error:
                return f"the server's answer cannot be decoded: {error}"
            self.breaker.succeeded()
            answer = reply.answer
            if reply.call_id == self._attach_id:
                if not isinstance(answer, Attached):
                    if isinstance(answer, Refused):
                        self._listener.refused(answer)
                        return f"the server refused: {answer.reason}"
                    return f"the server answered {type(answer).__name__} to Attach"
                why = self._listener.attached(answer, reply.version)
                if why is not None:
                    return why
                self.is_attached = True
                self._send(socket, list(self._pending))
                continue
            self._listener.replied(reply.version)
            pending = self._pending.pop(reply.call_id, None)
            if pending is None:
                self._listener.unclaimed(answer)
            elif isinstance(answer, Refused):
                self._end(pending, CallFailure("refused", answer.reason))
                if answer.code == "not_attached":
                    return "the server does not know this process"
            else:
                self._end(pending, answer)

    def _take_calls(self) -> list[int]:
        """Fail what is over its deadline, take what has been asked; return what may be sent."""
        now_s = self._clock()
        for call_id, pending in list(self._pending.items()):
            if now_s >= pending.deadline_s:
                del self._pending[call_id]
                self.breaker.failed(now_s)
                self._end(pending, CallFailure("timeout"))
        taken: list[int] = []
        while self._outbox:
            pending = self._outbox.popleft()
            if self.breaker.allows(now_s):
                taken.append(self._admit(pending))
            else:
                self._end(pending, CallFailure("breaker_open"))
        if self.is_attached and self.breaker.state == "open" and self.breaker.allows(now_s):
            # A probe of our own: while the breaker is open, nobody may dare to call.
            taken.append(self._admit(_Pending(Lookup([]), now_s + self._patience.retry_s, _ignore)))
        return taken

    def _admit(self, pending: _Pending) -> int:
        call_id = next(self._call_ids)
        self._pending[call_id] = pending
        return call_id

    def _send(self, socket: MessageSocket, call_ids: list[int]) -> None:
        for call_id in call_ids:
            socket.send(self._encoder.encode(Call(call_id, self._pending[call_id].request)))

    def _lose_calls(self) -> None:
        """Fail the calls that must not be done twice; Attached will tell what came of them."""
        for call_id, pending in list(self._pending.items()):
            if isinstance(pending.request, GrantSlots):
                del self._pending[call_id]
                self._end(pending, CallFailure("connection_lost"))

    def _end_all(self) -> None:
        while self._outbox:
            self._admit(self._outbox.popleft())
        while self._pending:
            self._end(self._pending.popitem()[1], CallFailure("closed"))

    def _end(self, pending: _Pending, outcome: Answer | CallFailure) -> None:
        how = outcome.reason if isinstance(outcome, CallFailure) else "answered"
        self.calls[type(pending.request).__name__.lower(), how] += 1
        pending.done(outcome)


def _ignore(outcome: Answer | CallFailure) -> None:
    """Take what came of a probe: the breaker knows."""
