"""The async face of a worker against a real inbox: streams end exactly once, whatever the worker does."""

import asyncio
import secrets
import threading
import time

import pytest

from cluster.replica import Replica, ReplicaUnavailableError
from workers.inbox import Inbox
from workers.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    KVEvent,
    KVEventBatch,
    LoadReport,
    ReplicaId,
    RequestId,
    RequestOutput,
    SamplingParams,
    SubmitRequest,
    Welcome,
)

SECRET = secrets.token_bytes(32)
LOAD = LoadReport(1, 0, 0, 8, 8, 0, 0.01)


class FakeWorker:
    """An inbox whose thread answers every request with `tokens`, one a step, at `step_s`."""

    def __init__(self, tokens=3, incarnation=1, step_s=0.005, hold=False, card="card", name="r0"):
        self.tokens = tokens
        self.incarnation = incarnation
        self.step_s = step_s
        self.hold = hold
        self.silent = False
        self.received = []
        self.kv_events = None
        self.welcomes = 0
        self.card = card
        self.name = ReplicaId(name)
        self.running = {}
        self.stopping = threading.Event()
        self.inbox = Inbox("127.0.0.1", SECRET, self.welcome)
        self.endpoint = self.inbox.endpoint
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def welcome(self):
        self.welcomes += 1
        return Welcome(
            PROTOCOL_VERSION, self.name, self.incarnation, self.card, b"n" * 16, 16, 2048, 256, 0, []
        )

    def run(self):
        step = 0
        while not self.stopping.wait(self.step_s):
            outputs = []
            for message in self.inbox.drain(0.0):
                self.received.append(message)
                if isinstance(message, SubmitRequest):
                    self.running[message.request_id] = 0
                    outputs.append(RequestOutput(message.request_id, [], []))
                elif isinstance(message, AbortRequest):
                    self.running.pop(message.request_id, None)
                    outputs.append(RequestOutput(message.request_id, [], [], message.finish_reason))
            if not self.hold:
                for request_id in list(self.running):
                    self.running[request_id] += 1
                    end = "length" if self.running[request_id] == self.tokens else None
                    outputs.append(RequestOutput(request_id, [self.running[request_id]], [], end))
                    if end:
                        del self.running[request_id]
            step += 1
            if not self.silent:
                kv_events, self.kv_events = self.kv_events, None
                self.inbox.publish(
                    outputs, incarnation=self.incarnation, step=step, load=LOAD, kv_events=kv_events
                )
        self.inbox.close(0.2)

    def stop(self):
        self.stopping.set()
        self.thread.join(5)


class Listener:
    def __init__(self):
        self.calls = []
        self.accept = True

    def welcomed(self, welcome):
        self.calls.append(("welcomed", welcome.incarnation))

    def stepped(self, load, kv_events, answered, now_s):
        if kv_events is not None:
            self.calls.append(("events", kv_events.version))
            return self.accept
        return True

    def lost(self):
        self.calls.append(("lost", None))


@pytest.fixture
def worker():
    workers = []

    def make(**options):
        workers.append(FakeWorker(**options))
        return workers[-1]

    yield make
    for one in workers:
        one.stop()


@pytest.fixture
async def connect():
    replicas = []

    async def make(worker, listener=None, *, secret=SECRET, card_digest="card", lease_s=20.0, wait=True):
        replica = Replica(
            ReplicaId("r0"), worker.endpoint, secret, "api", listener or Listener(),
            card_digest=card_digest, lease_s=lease_s,
        )  # fmt: skip
        replicas.append(replica)
        await replica.start()
        if wait:
            await replica.wait_ready(5.0)
        return replica

    yield make
    for replica in replicas:
        await replica.close()


def submit(name):
    return SubmitRequest(RequestId(name), [1, 2], SamplingParams())


async def collect(stream, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        return [output async for output in stream]


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_streams_are_demultiplexed_and_end_once(worker, connect):
    replica = await connect(worker())
    streams = [replica.submit(submit(f"r{i}")) for i in range(8)]
    for stream, outputs in zip(streams, await asyncio.gather(*map(collect, streams)), strict=True):
        assert {o.request_id for o in outputs} == {stream.request_id}
        assert [t for o in outputs for t in o.token_ids] == [1, 2, 3]
        assert [o.finish_reason for o in outputs].count(None) == len(outputs) - 1
        assert outputs[-1].finish_reason == "length"
    assert replica.stats().num_streams == 0


@pytest.mark.parametrize("reason", ["abort", "stop"])
async def test_an_abort_reaches_the_worker_and_its_reason_comes_back(worker, connect, reason):
    held = worker(hold=True)
    replica = await connect(held)
    stream = replica.submit(submit("a"))
    assert (await anext(stream)).token_ids == []
    await stream.abort(reason)
    await stream.abort(reason)
    assert [o.finish_reason for o in await collect(stream)] == [reason]
    assert [m for m in held.received if isinstance(m, AbortRequest)] == [AbortRequest("a", reason)]


async def test_closing_an_unfinished_stream_aborts_it(worker, connect):
    held = worker(hold=True)
    replica = await connect(held)
    stream = replica.submit(submit("a"))
    await stream.aclose()
    await until(lambda: AbortRequest("a") in held.received)
    assert await collect(stream) == []
    assert replica.stats().num_streams == 0


async def test_a_dead_worker_ends_its_streams_with_a_documented_error(worker, connect):
    held = worker(hold=True)
    listener = Listener()
    replica = await connect(held, listener)
    streams = [replica.submit(submit(f"r{i}")) for i in range(3)]
    for stream in streams:
        await anext(stream)
    held.stop()
    for stream in streams:
        [end] = await collect(stream)
        assert (end.finish_reason, end.error_code) == ("error", "replica_lost")
        assert "disconnected" in end.error
    assert replica.unavailable_reason() is not None
    with pytest.raises(ReplicaUnavailableError):
        replica.submit(submit("late"))
    assert ("lost", None) in listener.calls


async def test_a_silent_worker_loses_its_lease(worker, connect):
    held = worker(hold=True)
    replica = await connect(held, lease_s=0.6)
    stream = replica.submit(submit("a"))
    await anext(stream)
    held.silent = True
    [end] = await collect(stream)
    assert (end.finish_reason, end.error_code) == ("error", "replica_lost")
    assert "silent" in end.error


async def test_another_incarnation_ends_the_streams_and_is_greeted_anew(worker, connect):
    held = worker(hold=True)
    listener = Listener()
    replica = await connect(held, listener)
    stream = replica.submit(submit("a"))
    await anext(stream)
    held.incarnation = 2
    [end] = await collect(stream)
    assert "incarnation" in end.error
    await until(lambda: replica.welcome is not None and replica.welcome.incarnation == 2)
    assert listener.calls == [("welcomed", 1), ("lost", None), ("welcomed", 2)]


async def test_a_gap_in_the_events_asks_for_a_snapshot(worker, connect):
    one = worker()
    listener = Listener()
    listener.accept = False
    await connect(one, listener)
    one.kv_events = KVEventBatch(1, 4, 5, [KVEvent("stored", [b"k" * 16])])
    await until(lambda: one.welcomes == 2)
    await until(lambda: listener.calls == [("welcomed", 1), ("events", 5), ("welcomed", 1)])


async def test_another_card_is_turned_down(worker, connect):
    replica = await connect(worker(card="theirs"), card_digest="ours", wait=False)
    with pytest.raises(ReplicaUnavailableError, match=r"theirs.*ours"):
        await replica.wait_ready(0.5)


async def test_another_replicas_worker_is_turned_down(worker, connect):
    """A port that a dead worker had may become another's."""
    listener = Listener()
    replica = await connect(worker(name="r1"), listener, wait=False)
    with pytest.raises(ReplicaUnavailableError, match=r"of r1, not of r0"):
        await replica.wait_ready(0.5)
    assert ("welcomed", 1) not in listener.calls


async def test_a_worker_given_up_ends_its_streams_and_another_takes_its_place(worker, connect):
    held = worker(hold=True)
    listener = Listener()
    replica = await connect(held, listener)
    stream = replica.submit(submit("a"))
    await anext(stream)
    replica.leave("restarting")
    [end] = await collect(stream)
    assert (end.finish_reason, end.error_code) == ("error", "replica_lost")
    assert "restarting" in end.error
    await until(lambda: ("lost", None) in listener.calls)
    await asyncio.sleep(0.6)  # longer than the first pause between tries
    assert held.welcomes == 1, "nobody goes back to the worker that was given up"
    assert replica.unavailable_reason() == "restarting"
    with pytest.raises(ReplicaUnavailableError, match="restarting"):
        replica.submit(submit("early"))

    heir = worker(incarnation=2)
    replica.move(heir.endpoint)
    await replica.wait_ready(5.0)
    assert (await collect(replica.submit(submit("b"))))[-1].finish_reason == "length"
    assert listener.calls == [("welcomed", 1), ("lost", None), ("welcomed", 2)]


async def test_a_replica_without_a_worker_closes_at_once(worker, connect):
    replica = await connect(worker())
    replica.leave("restarting")
    begin = time.monotonic()
    await replica.close()
    assert time.monotonic() - begin < 2.0


async def test_a_wrong_secret_is_told_apart(worker, connect):
    replica = await connect(worker(), secret=secrets.token_bytes(32), wait=False)
    with pytest.raises(ReplicaUnavailableError, match="same cluster secret"):
        await replica.wait_ready(0.5)


async def test_close_ends_open_streams_and_leaves_no_thread(worker, connect):
    replica = await connect(worker(hold=True))
    stream = replica.submit(submit("a"))
    begin = time.monotonic()
    await replica.close()
    assert time.monotonic() - begin < 2.0
    assert (await collect(stream))[-1].finish_reason == "error"
    assert not any(t.name == "replica-receiver" for t in threading.enumerate())
