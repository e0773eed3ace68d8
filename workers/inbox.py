"""Rank 0's mailbox: the ZMQ ROUTER to which API processes connect, and who owns which request.

Owned and called by the step loop's thread alone; zmq's IO threads move the bytes without the interpreter.
CURVE encrypts; a ZAP check admits only clients that hold the cluster secret.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import zmq
from zmq.utils import z85

from cache_service.curve import curve_keys
from workers.protocol import (
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    PROTOCOL_VERSION,
    AbortRequest,
    ClientMessage,
    Hello,
    KVEventBatch,
    LoadReport,
    Received,
    Refusal,
    RequestId,
    RequestOutput,
    StepMessage,
    SubmitRequest,
    Welcome,
    WorkerMessage,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20
SEND_QUEUE_MESSAGES = 10_000
"""A client this many steps behind is not reading: it is dropped and its requests aborted."""
ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass
class _Client:
    """One connected API process."""

    name: str
    requests: set[RequestId] = field(default_factory=set)
    rejected: list[RequestOutput] = field(default_factory=list)
    """Refused here, before the scheduler saw them; part of the next step message."""


class Inbox:
    """Receives what clients ask, sends each client its own requests' outputs.

    `welcome` makes the answer to a Hello: the worker's identity and a snapshot of its prefix tree.
    """

    def __init__(self, host: str, cluster_secret: bytes, welcome: Callable[[], Welcome]) -> None:
        self._welcome = welcome
        self._clients: dict[bytes, _Client] = {}
        self._owners: dict[RequestId, bytes] = {}
        self._lost: list[AbortRequest] = []
        self._decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._client_key = z85.decode(curve_keys(cluster_secret, "client").public)
        self.refusals: Counter[str] = Counter()
        """Messages and clients turned away, by reason."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(ZAP_ENDPOINT)
        self._socket = self._open_socket(cluster_secret)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._zap, zmq.POLLIN)

    @property
    def num_clients(self) -> int:
        """API processes that said Hello and have not been found gone."""
        return len(self._clients)

    @property
    def requests(self) -> list[RequestId]:
        """All requests whose end has not been sent yet."""
        return list(self._owners)

    def drain(self, timeout_s: float) -> list[Received]:
        """Return all that has arrived, in order; wait up to `timeout_s` for the first message.

        Hellos are answered here. Requests of clients that went away come back as AbortRequests.
        """
        received: list[Received] = []
        if self._lost:
            received, self._lost = list(self._lost), []
            timeout_s = 0.0
        if not self._poller.poll(int(timeout_s * 1000)):
            return received
        self._admit_clients()
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = self._accept(frames)
            if message is not None:
                received.append(message)
        return received

    def publish(
        self,
        outputs: Iterable[RequestOutput],
        *,
        incarnation: int,
        step: int,
        load: LoadReport,
        kv_events: KVEventBatch | None,
    ) -> None:
        """Send every client one StepMessage: its own requests' outputs, the load, the KV news."""
        parts: dict[bytes, list[RequestOutput]] = {}
        for identity, client in self._clients.items():
            parts[identity], client.rejected = client.rejected, []
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            parts[owner].append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
                self._clients[owner].requests.discard(output.request_id)
        for identity, part in parts.items():
            self._send(identity, StepMessage(incarnation, step, part, load, kv_events))

    def close(self, linger_s: float = 1.0) -> None:
        """Send what is queued, within `linger_s`, and give the port back."""
        self._socket.close(linger=int(linger_s * 1000))
        self._zap.close(linger=0)
        self._context.term()

    def _open_socket(self, cluster_secret: bytes) -> zmq.Socket[bytes]:
        keys = curve_keys(cluster_secret, "server")
        socket = self._context.socket(zmq.ROUTER)
        socket.router_mandatory = True  # a send to a client that left fails instead of vanishing
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.sndhwm = SEND_QUEUE_MESSAGES
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.curve_server = True
        socket.curve_secretkey = keys.secret
        socket.zap_domain = b"eyrie"
        return socket

    def _admit_clients(self) -> None:
        """Answer pending ZAP requests (RFC 27): the client's CURVE key must come from the cluster secret."""
        while True:
            try:
                version, request_id, _, address, _, mechanism, *credentials = self._zap.recv_multipart(
                    zmq.NOBLOCK
                )
            except zmq.Again:
                return
            if mechanism == b"CURVE" and credentials == [self._client_key]:
                status, text = b"200", b"OK"
            else:
                status, text = b"400", b"unknown client key"
                self.refusals["client_key"] += 1
                logger.warning("refused a client with an unknown key", extra={"address": address.decode()})
            self._zap.send_multipart([version, request_id, status, text, b"eyrie", b""])

    def _accept(self, frames: list[bytes]) -> Received | None:
        """Decode one client's message and book it; answer Hellos; refuse what is not understood."""
        identity = frames[0]
        try:
            message = self._decoder.decode(b"".join(frames[1:]))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # ValidationError texts name a field's path and types, never its value.
            self._refuse(identity, "undecodable", f"cannot decode the message: {error}")
            return None
        if isinstance(message, Hello):
            self._greet(identity, message)
            return None
        client = self._clients.get(identity)
        if client is None:
            self._refuse(identity, "no_hello", f"{type(message).__name__} before Hello; send Hello first")
            return None
        if isinstance(message, SubmitRequest):
            if message.request_id in self._owners:
                self.refusals["duplicate_id"] += 1
                client.rejected.append(
                    RequestOutput(
                        message.request_id, [], [], "rejected",
                        error=f"a request named {message.request_id} is already running; ids must be unique",
                        error_code="bad_request",
                    )
                )  # fmt: skip
                return None
            self._owners[message.request_id] = identity
            client.requests.add(message.request_id)
        elif isinstance(message, AbortRequest) and message.request_id not in client.requests:
            return None  # ended meanwhile, or another client's
        return message

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            self._refuse(
                identity,
                "protocol_version",
                f"the client speaks protocol {hello.protocol_version}, this worker {PROTOCOL_VERSION}; "
                "run the same release of eyrie in both",
            )
            return
        self._clients.setdefault(identity, _Client(hello.client_id))
        self._send(identity, self._welcome())

    def _refuse(self, identity: bytes, kind: str, reason: str) -> None:
        self.refusals[kind] += 1
        logger.warning("refused a message", extra={"kind": kind, "reason": reason})
        self._send(identity, Refusal(PROTOCOL_VERSION, reason))

    def _send(self, identity: bytes, message: WorkerMessage) -> None:
        try:
            self._socket.send_multipart([identity, self._encoder.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self._forget(identity, "it does not read")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(identity, "it disconnected")

    def _forget(self, identity: bytes, why: str) -> None:
        """Drop a client; its requests come out of the next `drain` as aborts."""
        client = self._clients.pop(identity, None)
        if client is None:
            return
        logger.info(
            "client lost", extra={"client": client.name, "why": why, "requests": len(client.requests)}
        )
        for request_id in client.requests:
            del self._owners[request_id]
            self._lost.append(AbortRequest(request_id))
