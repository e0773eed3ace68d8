"""The async face of one TP group: submit, abort, stats.

Lives in an API process, on its event loop. Its Connection's thread decodes, feeds the router's listener and
hands each step's outputs over with one `call_soon_threadsafe`; they are demultiplexed here.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from cluster.connection import Connection, WrongWorkerError
from workers.protocol import (
    AbortRequest,
    FinishReason,
    KVEventBatch,
    LoadReport,
    ReplicaId,
    RequestId,
    RequestOutput,
    SubmitRequest,
    Welcome,
)

REPLICA_LOST = "replica_lost"
"""`error_code` of requests whose replica died, went silent or was replaced."""


class ReplicaListener(Protocol):
    """What the router hears of one replica. Called in that replica's receiver thread, one call at a time."""

    def welcomed(self, welcome: Welcome) -> None:
        """Take a snapshot of the prefix tree."""

    def stepped(
        self, load: LoadReport, kv_events: KVEventBatch | None, answered: list[RequestId], now_s: float
    ) -> bool:
        """Take one step's news: the load, the requests it tells of, which the load counts, and the events.

        Return False to ask for a fresh snapshot (a gap in the events).
        """
        ...

    def lost(self) -> None:
        """Forget load and prefixes: the replica is gone or another incarnation took its place."""


@dataclass(frozen=True)
class ReplicaStats:
    """One replica as its API process sees it."""

    endpoint: str
    state: str
    """`ready`, or why not."""
    num_streams: int


class ReplicaUnavailableError(Exception):
    """The replica takes no requests now; the message says why."""


class ReplicaStream:
    """One request's outputs, in order; the last carries the finish reason. Belongs to the event loop."""

    def __init__(self, replica: "Replica", request_id: RequestId) -> None:
        self._replica = replica
        self.request_id = request_id
        self._outputs: deque[RequestOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_finished = False
        self._is_aborted = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._is_finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await (
                    self._waiter
                )  # no timeout of its own: the replica's lease ends a silent worker's streams
            finally:
                self._waiter = None
        return self._outputs.popleft()

    async def abort(self, finish_reason: FinishReason = "abort") -> None:
        """Ask the worker to end the request; its last output then says `finish_reason`. Idempotent."""
        if not self._is_finished and not self._is_aborted:
            self._is_aborted = True
            self._replica.abort(self.request_id, finish_reason)

    async def aclose(self) -> None:
        """Abort when unfinished and drop what is still to come. Idempotent."""
        await self.abort()
        self._replica.forget(self.request_id)
        self._outputs.clear()
        self._is_finished = True
        self._wake()

    def push(self, output: RequestOutput) -> None:
        """Take one output from the worker."""
        if self._is_finished:
            return
        self._outputs.append(output)
        self._is_finished = output.finish_reason is not None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Replica:
    """Client of one worker inbox; itself the ConnectionListener of its Connection.

    A restarted worker is another inbox, to which `move` leads. Whatever ends the connection (disconnect,
    `lease_s` of silence, another incarnation, a refusal) ends every open stream with finish_reason `error`
    and code `replica_lost`.
    """

    def __init__(
        self,
        replica_id: ReplicaId,
        endpoint: str,
        cluster_secret: bytes,
        client_id: str,
        listener: ReplicaListener,
        *,
        card_digest: str,
        lease_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self._replica_id = replica_id
        self._listener = listener
        self._card_digest = card_digest
        self._clock = clock
        self._connection = Connection(endpoint, cluster_secret, client_id, self, lease_s=lease_s, clock=clock)
        self._streams: dict[RequestId, ReplicaStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = asyncio.Event()
        self._generation = 0
        self._welcome: Welcome | None = None
        self._why_not = "connecting"
        self._why_down: str | None = None
        """While it has no worker."""
        self._is_closed = False

    async def start(self) -> None:
        """Begin to connect, on the running loop; `wait_ready` says when the worker answered."""
        self._loop = asyncio.get_running_loop()
        self._connection.start()

    async def wait_ready(self, timeout_s: float) -> Welcome:
        """Return the worker's Welcome; raise ReplicaUnavailableError when none comes in time."""
        try:
            await asyncio.wait_for(self._is_open.wait(), timeout_s)
        except TimeoutError:
            raise ReplicaUnavailableError(
                f"worker at {self.endpoint} did not answer within {timeout_s:g} s: {self._why_not}"
            ) from None
        assert self._welcome is not None
        return self._welcome

    @property
    def welcome(self) -> Welcome | None:
        """The handshake of the live connection."""
        return self._welcome

    def unavailable_reason(self) -> str | None:
        """Return None when the replica takes requests, else why it does not."""
        return None if self._welcome is not None else self._why_down or self._why_not

    def stats(self) -> ReplicaStats:
        """Return what this process knows of the replica."""
        return ReplicaStats(self.endpoint, self.unavailable_reason() or "ready", len(self._streams))

    def submit(self, request: SubmitRequest) -> ReplicaStream:
        """Send a request; raise ReplicaUnavailableError when there is no live worker."""
        if self._welcome is None:
            raise ReplicaUnavailableError(self._why_down or self._why_not)
        assert request.request_id not in self._streams, "request ids are unique"
        stream = ReplicaStream(self, request.request_id)
        self._streams[request.request_id] = stream
        self._connection.send(self._generation, request)
        return stream

    def abort(self, request_id: RequestId, finish_reason: FinishReason) -> None:
        """Tell the worker to end a request; no effect once it ended."""
        if request_id in self._streams:
            self._connection.send(self._generation, AbortRequest(request_id, finish_reason))

    def forget(self, request_id: RequestId) -> None:
        """Drop a request's later outputs."""
        self._streams.pop(request_id, None)

    def leave(self, why: str) -> None:
        """Give the worker up: open streams end, `unavailable_reason` says `why` until `move`."""
        self._why_down = why
        self._connection.move(None)
        self._end(why)

    def move(self, endpoint: str) -> None:
        """Connect to the worker that was started in the former one's place."""
        self.endpoint = endpoint
        self._why_down, self._why_not = None, "connecting"
        self._connection.move(endpoint)

    async def close(self) -> None:
        """Send what is queued, disconnect, end what is still open. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(None, self._connection.close)
        self._end("the service closed the connection")

    # Called by the Connection, in its thread.

    def opened(self, generation: int, welcome: Welcome) -> None:
        """Take a handshake."""
        if welcome.replica_id != self._replica_id:
            raise WrongWorkerError(
                f"worker at {self.endpoint} is of {welcome.replica_id}, not of {self._replica_id}"
            )
        if welcome.card_digest != self._card_digest:
            raise WrongWorkerError(
                f"worker at {self.endpoint} serves model card {welcome.card_digest}, this process has read "
                f"{self._card_digest}; point both at the same files"
            )
        self._listener.welcomed(welcome)
        self._call(self._begin, generation, welcome)

    def stepped(self, outputs: list[RequestOutput], load: LoadReport, kv_events: KVEventBatch | None) -> bool:
        """Take one step's message."""
        if outputs:
            self._call(self._deliver, outputs)
        answered = [output.request_id for output in outputs]
        return self._listener.stepped(load, kv_events, answered, self._clock())

    def closed(self, why: str) -> None:
        """Take the loss of the connection."""
        self._listener.lost()
        self._call(self._end, why)

    def _call(self, action: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *arguments)

    # On the event loop.

    def _begin(self, generation: int, welcome: Welcome) -> None:
        self._generation = generation
        self._welcome = welcome
        self._is_open.set()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._streams[output.request_id]
            stream.push(output)

    def _end(self, why: str) -> None:
        self._welcome = None
        self._why_not = why
        self._is_open.clear()
        streams, self._streams = self._streams, {}
        error = f"the replica serving this request was lost ({why})"
        for stream in streams.values():
            stream.push(
                RequestOutput(stream.request_id, [], [], "error", error=error, error_code=REPLICA_LOST)
            )
