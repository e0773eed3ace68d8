import asyncio
import json

import pytest

from cluster.api.app import create_app
from tests.unit.api_fakes import FakeRouter, library_tokenizer, make_service

TOKENS = library_tokenizer().encode("the cat sat").ids


class Client:
    """One HTTP request driven by hand: sends its body, reads what comes, hangs up when told."""

    def __init__(self, app, path, body, reads=True):
        self.received = []
        self.status = None
        self.hung_up = asyncio.Event()
        self._body = json.dumps(body).encode()
        self._sent = False
        self._reads = reads
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if not self._reads:
            await asyncio.Event().wait()
        self.received.append(message["body"])

    async def hang_up(self):
        self.hung_up.set()
        await asyncio.wait_for(self.task, 5)


def body(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


async def started(router, num=1):
    async with asyncio.timeout(5):
        for _ in range(num):
            await router.submitted.acquire()
    return router.streams


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
async def test_a_hang_up_aborts_running_and_queued_requests(stream, num_steps):
    # num_steps 0: not even acknowledged; 1: queued; 2: a token came.
    router = FakeRouter()
    service, recorder = make_service(router)
    client = Client(create_app(service), "/v1/chat/completions", body(stream=stream, n=2))
    await started(router, 2)
    for one in router.streams:
        one.push(*[one.output(), one.output(TOKENS[:1])][:num_steps])
    await asyncio.sleep(0.02)
    await client.hang_up()
    assert [one.aborted for one in router.streams] == [["abort"], ["abort"]]
    assert all(one.closed for one in router.streams)
    assert [summary.finish_reason for summary in recorder.summaries] == ["abort", "abort"]
    assert recorder.answers == [("/v1/chat/completions", 499)]
    assert service.lifecycle.num_calls == 0


async def test_a_hang_up_while_the_router_places_the_request_leaves_nothing_behind():
    class SlowRouter(FakeRouter):
        cancelled = False

        async def submit(self, request):
            self.submitted.release()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise

    router = SlowRouter()
    service, _ = make_service(router)
    client = Client(create_app(service), "/v1/chat/completions", body())
    await asyncio.wait_for(router.submitted.acquire(), 5)
    await client.hang_up()
    assert router.cancelled


async def test_a_hang_up_while_the_client_does_not_read_aborts_too():
    router = FakeRouter()
    service, _ = make_service(router)
    client = Client(create_app(service), "/v1/chat/completions", body(stream=True), reads=False)
    (one,) = await started(router)
    one.push(one.output(), one.output(TOKENS[:1]))
    await asyncio.sleep(0.02)
    await client.hang_up()
    assert one.aborted == ["abort"]


async def test_a_hang_up_before_the_body_is_complete_ends_the_call():
    service, recorder = make_service(FakeRouter())
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def send(message):
        raise AssertionError("nobody is there")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
    }
    await create_app(service)(scope, receive, send)
    assert recorder.answers == [("/v1/completions", 499)]


@pytest.mark.parametrize("stream", [True, False])
async def test_drain_lets_running_calls_finish_and_refuses_new_ones(stream):
    router = FakeRouter()
    service, _ = make_service(router)
    app = create_app(service)
    running = Client(app, "/v1/chat/completions", body(stream=stream))
    (one,) = await started(router)
    one.push(one.output())
    drain = asyncio.create_task(service.lifecycle.drain(30.0))
    await asyncio.sleep(0)
    refused = Client(app, "/v1/chat/completions", body())
    await refused.task
    assert refused.status == 503
    assert b'"draining"' in refused.received[0]
    assert not drain.done()
    one.push(one.output([*TOKENS, 0], "stop"))
    await asyncio.wait_for(asyncio.gather(running.task, drain), 5)
    assert running.status == 200
    assert b"the cat sat" in b"".join(running.received)


async def test_an_idle_server_drains_at_once_and_ends_nothing(caplog):
    service, _ = make_service(FakeRouter())
    await service.lifecycle.drain(0.0)
    assert service.lifecycle.is_draining
    assert caplog.records == []


@pytest.mark.parametrize("stream", [True, False])
async def test_past_the_drain_deadline_calls_end_with_their_text_and_a_finish_reason(stream):
    router = FakeRouter()
    service, recorder = make_service(router)
    running = Client(create_app(service), "/v1/chat/completions", body(stream=stream))
    (one,) = await started(router)
    one.push(one.output(), one.output(TOKENS))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(service.lifecycle.drain(0.01), 5)
    await asyncio.wait_for(running.task, 5)
    answer = b"".join(running.received)
    assert running.status == 200
    assert b"the cat sat" in answer
    assert b'"finish_reason":"shutdown"' in answer
    assert [summary.finish_reason for summary in recorder.summaries] == ["shutdown"]


async def test_a_drain_cut_short_ends_calls_at_once_and_is_not_told_as_a_deadline(caplog):
    caplog.set_level("INFO")
    router = FakeRouter()
    service, recorder = make_service(router)
    running = Client(create_app(service), "/v1/chat/completions", body(stream=True))
    (one,) = await started(router)
    one.push(one.output(), one.output(TOKENS))
    drain = asyncio.create_task(service.lifecycle.drain(0.2))
    await asyncio.sleep(0.02)
    one.abort = _slow(one.abort)  # the drain's deadline passes while the calls are being ended
    await asyncio.wait_for(service.lifecycle.end_now(), 5)
    await asyncio.wait_for(asyncio.gather(drain, running.task), 5)
    assert [summary.finish_reason for summary in recorder.summaries] == ["shutdown"]
    told = [record.getMessage() for record in caplog.records if record.name == "cluster.api.lifecycle"]
    assert told == ["stopped before all calls finished, ending them"]


def _slow(abort):
    async def slow(reason):
        await asyncio.sleep(0.4)
        await abort(reason)

    return slow
