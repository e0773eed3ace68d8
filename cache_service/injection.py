"""Injection: what tests do to messages on their way: late, lost, twice, damaged, overtaken by others.

An InjectedSocket stands where a client's zmq socket would: for calls and their answers, and for broadcasts.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

import zmq

Way = Literal["sent", "heard"]


class MessageSocket(Protocol):
    """What clients use of a zmq socket."""

    def send(self, message: bytes, /) -> object:
        """Queue a message."""

    def recv(self, flags: int, /) -> bytes:
        """Return the next message; raise zmq.Again where there is none."""
        ...


@dataclass(frozen=True)
class MessageInjection:
    """Faults for tests, a function of seed, way and the message's number on it alone.

    No configuration reaches it.
    """

    seed: int
    delay_ratio: float = 0.0
    """Of all messages: they wait, and those behind them pass."""
    max_delay_s: float = 0.0
    loss_ratio: float = 0.0
    duplicate_ratio: float = 0.0
    """They come again, up to `max_delay_s` later."""
    damage_ratio: float = 0.0
    """They lose their end, so that nobody can decode them."""


@dataclass(frozen=True)
class ClientInjection:
    """What happens to the messages of one CacheClient."""

    calls: MessageInjection | None = None
    """And to the answers."""
    broadcasts: MessageInjection | None = None


NO_INJECTION = ClientInjection()


class InjectedSocket:
    """Sends and receives through one real socket after another. For one thread but for `stop`."""

    def __init__(self, injection: MessageInjection, clock: Callable[[], float]) -> None:
        self.counts: Counter[tuple[Way, str]] = Counter()
        """Messages by what happened to them."""
        self._injection = injection
        self._clock = clock
        self._socket: zmq.Socket[bytes] | None = None
        self._numbers: Counter[Way] = Counter()
        self._waiting: dict[Way, list[tuple[float, int, bytes]]] = {"sent": [], "heard": []}
        self._is_over = False

    def use(self, socket: zmq.Socket[bytes]) -> None:
        """Go on with a new socket; what was under way is gone with the last one."""
        self._socket = socket
        for waiting in self._waiting.values():
            waiting.clear()

    def stop(self) -> None:
        """Let all messages pass from now on, after those that are late. Any thread may call it."""
        self._is_over = True

    @property
    def wait_s(self) -> float:
        """How long it takes until something is due."""
        due_s = min((waiting[0][0] for waiting in self._waiting.values() if waiting), default=math.inf)
        return max(0.0, due_s - self._clock())

    def send(self, message: bytes) -> None:
        """See MessageSocket."""
        self._put("sent", message)
        self._send_due()

    def recv(self, flags: int) -> bytes:
        """See MessageSocket; also sends what is due by now."""
        assert self._socket is not None, "there is no socket yet"
        self._send_due()
        try:
            while True:
                self._put("heard", self._socket.recv(flags))
        except zmq.Again:
            message = self._take("heard")
            if message is None:
                raise
            return message

    def _put(self, way: Way, message: bytes) -> None:
        self._numbers[way] += 1
        now_s = self._clock()
        if self._is_over:
            last_s = max((due_s for due_s, _, _ in self._waiting[way]), default=now_s)
            self._wait(way, max(now_s, last_s), message)
            return
        injection = self._injection
        random = Random(f"{injection.seed}/{way}/{self._numbers[way]}")
        is_late, is_lost, is_double, is_damaged = (
            random.random() < ratio
            for ratio in (
                injection.delay_ratio,
                injection.loss_ratio,
                injection.duplicate_ratio,
                injection.damage_ratio,
            )
        )
        delay_s, again_s = (random.uniform(0, injection.max_delay_s) for _ in range(2))
        if is_lost:
            self.counts[way, "lost"] += 1
            return
        if is_damaged:
            self.counts[way, "damaged"] += 1
            message = message[: len(message) // 2]
        if is_late:
            self.counts[way, "late"] += 1
        self._wait(way, now_s + delay_s if is_late else now_s, message)
        if is_double:
            self.counts[way, "twice"] += 1
            self._numbers[way] += 1
            self._wait(way, now_s + again_s, message)

    def _wait(self, way: Way, due_s: float, message: bytes) -> None:
        heapq.heappush(self._waiting[way], (due_s, self._numbers[way], message))

    def _take(self, way: Way) -> bytes | None:
        waiting = self._waiting[way]
        return heapq.heappop(waiting)[2] if waiting and waiting[0][0] <= self._clock() else None

    def _send_due(self) -> None:
        assert self._socket is not None, "there is no socket yet"
        while (message := self._take("sent")) is not None:
            self._socket.send(message)
