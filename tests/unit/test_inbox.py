"""The worker's mailbox over real sockets: who may talk, who hears what, what a lost client leaves behind."""

import contextlib
import secrets
import time

import msgspec
import pytest
import zmq

from cache_service.curve import curve_keys
from workers.inbox import Inbox
from workers.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    Hello,
    LoadReport,
    Refusal,
    ReplicaId,
    RequestId,
    RequestOutput,
    SamplingParams,
    StepMessage,
    SubmitRequest,
    Welcome,
    WorkerMessage,
)

SECRET = secrets.token_bytes(32)
LOAD = LoadReport(0, 0, 0, 8, 8, 0, 0.0)
WELCOME = Welcome(PROTOCOL_VERSION, ReplicaId("replica-0"), 3, "card", b"n" * 16, 16, 2048, 256, 0, [])


class Client:
    """A raw DEALER, without the retries of cluster.connection."""

    def __init__(self, endpoint, secret=SECRET, client_role="client"):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = -1
        keys = curve_keys(secret, client_role)
        self.socket.curve_serverkey = curve_keys(secret, "server").public
        self.socket.curve_publickey = keys.public
        self.socket.curve_secretkey = keys.secret
        self.socket.connect(endpoint)

    def send(self, message):
        self.socket.send(message if isinstance(message, bytes) else msgspec.msgpack.encode(message))

    def receive(self, timeout_s=2.0):
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        return msgspec.msgpack.decode(self.socket.recv(), type=WorkerMessage)

    def close(self):
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def inbox():
    inbox = Inbox("127.0.0.1", SECRET, lambda: WELCOME)
    yield inbox
    inbox.close()


@pytest.fixture
def connect(inbox):
    clients = []

    def make(hello=True, **options):
        client = Client(inbox.endpoint, **options)
        clients.append(client)
        if hello:
            client.send(Hello(PROTOCOL_VERSION, f"api-{len(clients)}"))
            pump(inbox, lambda: client.socket.poll(0))
            assert client.receive() == WELCOME
        return client

    yield make
    for client in clients:
        client.close()


def pump(inbox, until, timeout_s=3.0):
    """Drain until the condition holds; return all that was received."""
    received = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        received += inbox.drain(0.01)
        if until():
            return received
    return received


def submit(name):
    return SubmitRequest(RequestId(name), [1, 2], SamplingParams())


def publish(inbox, *outputs):
    inbox.publish(outputs, incarnation=3, step=1, load=LOAD, kv_events=None)


def take(inbox, num_messages):
    received = []
    deadline = time.monotonic() + 3
    while len(received) < num_messages and time.monotonic() < deadline:
        received += inbox.drain(0.05)
    return received


def test_each_client_gets_only_its_own_requests_and_everyone_the_load(inbox, connect):
    first, second = connect(), connect()
    first.send(submit("a"))
    second.send(submit("b"))
    assert {m.request_id for m in take(inbox, 2)} == {"a", "b"}
    publish(inbox, RequestOutput("a", [1], []), RequestOutput("b", [2], [], "length"))
    assert first.receive() == StepMessage(3, 1, [RequestOutput("a", [1], [])], LOAD)
    assert second.receive() == StepMessage(3, 1, [RequestOutput("b", [2], [], "length")], LOAD)
    assert inbox.requests == ["a"]


def test_another_protocol_version_is_refused_by_name(inbox, connect):
    client = connect(hello=False)
    client.send(Hello(PROTOCOL_VERSION + 1, "from the future"))
    pump(inbox, lambda: inbox.refusals)
    refusal = client.receive()
    assert isinstance(refusal, Refusal)
    assert str(PROTOCOL_VERSION + 1) in refusal.reason
    assert refusal.protocol_version == PROTOCOL_VERSION
    assert inbox.refusals == {"protocol_version": 1}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"hello",
        msgspec.msgpack.encode(["submit", "id"]),
        msgspec.msgpack.encode(["submit", 5, [1], []]),
        msgspec.msgpack.encode({"type": "hello"}),
        msgspec.msgpack.encode(["unheard-of", 1, "x"]),
        b"\x93\xa5hello\x01\xa2\xff\xfe",  # a name that is not UTF-8
    ],
)
def test_what_cannot_be_decoded_is_refused_and_counted(inbox, connect, payload):
    client = connect()
    client.send(payload)
    pump(inbox, lambda: inbox.refusals)
    assert isinstance(client.receive(), Refusal)
    assert inbox.refusals == {"undecodable": 1}
    client.send(submit("a"))
    assert take(inbox, 1) == [submit("a")]


def test_a_client_that_skips_the_hello_is_refused(inbox, connect):
    client = connect(hello=False)
    client.send(submit("a"))
    pump(inbox, lambda: inbox.refusals)
    assert "Hello" in client.receive().reason
    assert inbox.requests == []


@pytest.mark.parametrize("options", [{"secret": secrets.token_bytes(32)}, {"client_role": "server"}])
def test_without_the_secret_nobody_gets_in(inbox, connect, options):
    client = connect(hello=False, **options)
    with contextlib.suppress(zmq.Again):  # turned away already
        client.socket.send(msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "intruder")), zmq.NOBLOCK)
    assert pump(inbox, lambda: client.socket.poll(0), timeout_s=0.5) == []
    assert client.receive(0.1) is None
    assert inbox.num_clients == 0


def test_the_requests_of_a_lost_client_are_aborted(inbox, connect):
    staying, leaving = connect(), connect()
    staying.send(submit("a"))
    leaving.send(submit("b"))
    take(inbox, 2)
    leaving.close()
    aborts = []
    deadline = time.monotonic() + 3
    while not aborts and time.monotonic() < deadline:
        publish(inbox)
        aborts = inbox.drain(0.02)
    assert aborts == [AbortRequest("b")]
    assert inbox.requests == ["a"]
    assert inbox.num_clients == 1


def test_nobody_may_abort_or_reuse_another_clients_request(inbox, connect):
    owner, other = connect(), connect()
    owner.send(submit("a"))
    take(inbox, 1)
    other.send(AbortRequest(RequestId("a")))
    other.send(submit("a"))
    assert pump(inbox, lambda: inbox.refusals) == []
    publish(inbox, RequestOutput("a", [9], []))
    assert owner.receive().outputs == [RequestOutput("a", [9], [])]
    [rejected] = other.receive().outputs
    assert (rejected.finish_reason, rejected.error_code) == ("rejected", "bad_request")


def test_an_idle_drain_waits_no_longer_than_asked(inbox):
    begin = time.monotonic()
    assert inbox.drain(0.05) == []
    assert 0.04 < time.monotonic() - begin < 1.0
