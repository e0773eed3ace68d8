import asyncio
import io
import logging
import threading

import httpx
import pytest

from cache_service.log_format import FieldFormatter
from cluster.api.app import create_app
from cluster.api.auth import tenant_salt
from cluster.api.ports import NoReplicaError, OverloadedError
from cluster.api.request_ids import RequestIdFilter, RequestIds
from cluster.api.text_threads import NUM_PROMPT_THREADS
from tests.unit.api_fakes import FakeRouter, make_service, says

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def client_of(service):
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://api")


async def get(path, router=None, **service_fields):
    service, _ = make_service(router or FakeRouter(), **service_fields)
    async with client_of(service) as client:
        return await client.get(path)


async def chat(router, headers=None, **service_fields):
    service, recorder = make_service(router, **service_fields)
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers or {})
    return response, recorder


async def test_health_is_200_while_no_replica_is_ready_and_ready_says_why():
    router = FakeRouter()
    router.not_ready = "r0: connecting"
    assert (await get("/health", router)).status_code == 200
    response = await get("/ready", router)
    assert response.status_code == 503
    assert response.json() == {"status": "not ready", "reason": "r0: connecting"}
    router.not_ready = None
    assert (await get("/ready", router)).json() == {"status": "ready"}


async def test_ready_is_503_while_draining():
    service, _ = make_service(FakeRouter())
    service.lifecycle.refuse_new()
    async with client_of(service) as client:
        assert (await client.get("/ready")).json()["reason"] == "draining"
        assert (await client.get("/health")).status_code == 200
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1


async def test_models_are_listed_with_the_context_the_replicas_hold():
    router = FakeRouter()
    router.max_context_len = 100
    (model,) = (await get("/v1/models", router)).json()["data"]
    assert (model["id"], model["max_model_len"], model["created"]) == ("tiny", 100, 1_700_000_000)
    assert (await get("/v1/models/tiny")).json()["object"] == "model"


async def test_metrics_and_their_targets_are_served():
    response = await get("/metrics")
    assert response.text == "eyrie_fake 1\n"
    assert response.headers["content-type"].startswith("text/plain")
    targets = (await get("/metrics/targets")).json()
    assert targets == [{"targets": ["127.0.0.1:9000"], "labels": {"replica": "r0"}}]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (NoReplicaError(11.6, "all are starting"), 503, "no_replica", "12"),
        (OverloadedError(7.4), 429, "overloaded", "7"),
    ],
)
async def test_a_router_without_room_is_told_with_retry_after(error, status, code, retry_after):
    router = FakeRouter()
    router.submit_error = error
    response, _ = await chat(router)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers["retry-after"] == retry_after


@pytest.mark.parametrize(
    ("error_code", "status", "code"),
    [
        ("queue_full", 429, "overloaded"),
        ("prompt_too_long", 400, "context_length_exceeded"),
        ("bad_request", 400, "bad_request"),
    ],
)
async def test_a_workers_refusal_is_told_before_a_stream_begins(error_code, status, code):
    router = FakeRouter(lambda stream: [stream.output(finish="rejected", error="why", error_code=error_code)])
    service, recorder = make_service(router)
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert [summary.finish_reason for summary in recorder.summaries] == ["rejected"]


async def test_one_refused_choice_takes_the_queued_ones_back():
    def script(stream):
        is_second = stream.request.request_id.endswith(".1")
        yield stream.output(finish="rejected" if is_second else None, error_code="queue_full")

    router = FakeRouter(script)
    service, recorder = make_service(router)
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "n": 3})
    assert response.status_code == 429
    assert [stream.aborted for stream in router.streams] == [["abort"], [], ["abort"]]
    assert [summary.finish_reason for summary in recorder.summaries] == ["rejected"] * 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OverloadedError(1.0), "rejected"),
        (NoReplicaError(1, "all left"), "rejected"),
        (KeyError(), "error"),
    ],
)
async def test_choices_placed_before_one_that_cannot_be_count_as_what_ended_them(error, reason):
    class ShrinkingRouter(FakeRouter):
        async def submit(self, request):
            if len(self.streams) == 2:
                raise error
            return await super().submit(request)

    service, recorder = make_service(ShrinkingRouter(says("x")))
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "n": 4})
    assert response.status_code >= 429
    assert [summary.finish_reason for summary in recorder.summaries] == [reason] * 2


async def test_metrics_do_not_wait_for_prompts():
    service, _ = make_service(FakeRouter())
    release = threading.Event()
    for _ in range(NUM_PROMPT_THREADS):
        service.threads.prompts.submit(release.wait, 10)
    try:
        async with client_of(service) as client, asyncio.timeout(3):
            assert (await client.get("/metrics")).status_code == 200
    finally:
        release.set()
        service.threads.close()


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (None, 401, "missing_api_key"),
        ("Basic key-one", 401, "missing_api_key"),
        ("Bearer ", 401, "missing_api_key"),
        ("Bearer key-on", 401, "invalid_api_key"),
        ("Bearer key-onee", 401, "invalid_api_key"),
        ("Bearer schlüssel", 401, "invalid_api_key"),
        ("Bearer key-one", 200, None),
        ("bearer  key-two", 200, None),
    ],
)
async def test_keys_are_checked_where_work_is_done(header, status, code):
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/chat/completions", "/v1/models"):
        service, _ = make_service(FakeRouter(says("x")), api_keys=["key-one", "key-two"])
        async with client_of(service) as client:
            if path == "/v1/models":
                response = await client.get(path, headers=headers)
            else:
                response = await client.post(path, json=CHAT, headers=headers)
            assert (await client.get("/ready")).status_code == 200
        assert response.status_code == status
        if code is not None:
            assert response.json()["error"]["code"] == code
            assert response.headers["www-authenticate"] == "Bearer"


async def test_each_key_has_its_own_salt_and_no_key_the_empty_one():
    salts = []
    for key in ("key-one", "key-two", "key-one"):
        router = FakeRouter(says("x"))
        await chat(router, {"authorization": f"Bearer {key}"}, api_keys=["key-one", "key-two"])
        salts.append(router.streams[0].request.tenant_salt)
    assert salts[0] == salts[2] != salts[1]
    assert salts[0] == tenant_salt(b"cluster secret", "key-one") != tenant_salt(b"other", "key-one")
    router = FakeRouter(says("x"))
    await chat(router)
    assert router.streams[0].request.tenant_salt == b""


async def test_a_request_id_is_made_or_accepted_and_returned():
    response, _ = await chat(FakeRouter(says("x")))
    assert response.headers["x-request-id"].startswith("req-b00t-")
    response, _ = await chat(FakeRouter(says("x")), {"x-request-id": "mine.1:a-b_c"})
    assert response.headers["x-request-id"] == "mine.1:a-b_c"
    assert response.json()["id"] == "chatcmpl-mine.1:a-b_c"


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "é", "a\tb", '"quoted"'])
async def test_a_request_id_unfit_for_logs_is_refused(offered):
    response, _ = await chat(FakeRouter(says("x")), {"x-request-id": offered.encode("latin-1")})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-id"
    assert response.headers["x-request-id"].startswith("req-")


async def test_workers_never_see_one_id_twice_though_clients_may_send_it_twice():
    router = FakeRouter(says("x"))
    service, _ = make_service(router)
    async with client_of(service) as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers={"x-request-id": "same"})
    ids = [stream.request.request_id for stream in router.streams]
    assert len(set(ids)) == 4
    assert all(request_id.startswith("same/") for request_id in ids)


def test_ids_of_two_starts_differ():
    first, second = RequestIds("aaaa"), RequestIds("bbbb")
    assert len({ids.make() for ids in (first, second) for _ in range(3)}) == 6


@pytest.fixture
def log():
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(FieldFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.stream
    root.removeHandler(handler)
    root.setLevel(level)


async def test_log_lines_carry_the_request_id_and_no_prompt_or_key(log):
    secrets = {"authorization": "Bearer planted-key", "x-request-id": "my-id"}
    body = {**CHAT, "messages": [{"role": "user", "content": "planted-prompt"}], "stop": ["planted-stop"]}

    def script(stream):
        logging.getLogger("router").info("placed")
        yield stream.output()
        raise ValueError(body["messages"])

    for router in (FakeRouter(says("planted-answer")), FakeRouter(script)):
        service, _ = make_service(router, api_keys=["planted-key"])
        async with client_of(service) as client:
            await client.post("/v1/chat/completions", json=body, headers=secrets)
            await client.post("/v1/chat/completions", json={**body, "planted-field": 1}, headers=secrets)
            await client.get("/v1/models/planted-model", headers=secrets)
            await client.get("/planted-path", headers=secrets)
    lines = [line for line in log.getvalue().splitlines() if " httpx: " not in line]
    assert not any("planted" in line for line in lines)
    assert any("router: placed" in line for line in lines)
    assert any("status=200" in line for line in lines) and any("status=500" in line for line in lines)
    assert all(" request_id=my-id" in line for line in lines)


async def test_an_unexpected_failure_is_a_500_with_the_id_and_a_log_of_where(log):
    router = FakeRouter()
    router.submit_error = ZeroDivisionError("SECRET")
    response, recorder = await chat(router, {"x-request-id": "my-id"})
    assert response.status_code == 500
    assert response.json()["error"]["request_id"] == "my-id"
    assert "SECRET" not in response.text + log.getvalue()
    assert "ZeroDivisionError" in log.getvalue() and "api_fakes.py" in log.getvalue()
    assert recorder.answers == [("/v1/chat/completions", 500)]


async def test_tokens_of_one_step_cross_to_the_thread_as_one_batch():
    service, _ = make_service(FakeRouter())
    jobs = []
    submit = service.threads.tokens.submit
    service.threads.tokens.submit = lambda job, *args: jobs.append(len(args[0])) or submit(job, *args)
    ran = []
    await asyncio.gather(
        *(service.threads.run_tokens(lambda place=place: ran.append(place)) for place in range(50))
    )
    assert jobs == [50]
    assert ran == list(range(50))


async def test_a_failed_job_on_tokens_is_raised_to_its_own_choice_only():
    service, _ = make_service(FakeRouter())

    def fail():
        raise KeyError("mine")

    outcomes = await asyncio.gather(
        service.threads.run_tokens(fail), service.threads.run_tokens(lambda: None), return_exceptions=True
    )
    assert isinstance(outcomes[0], KeyError) and outcomes[1] is None


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/metrics/targets"])
async def test_probes_are_logged_at_debug_only(path, caplog):
    caplog.set_level(logging.DEBUG, "cluster.api.door")
    for asked in (path, "/v1/models"):
        assert (await get(asked)).status_code == 200
    levels = {record.route: record.levelname for record in caplog.records if record.msg == "answered"}
    assert levels == {path: "DEBUG", "/v1/models": "INFO"}


async def test_an_unknown_path_is_told_the_paths_there_are():
    for path in ("/nowhere", "/v1/models/"):
        response = await get(path)
        assert response.status_code == 404
        paths = response.json()["error"]["message"].partition("paths are ")[2].rstrip(".").split(", ")
        assert "/v1/models/{model}" in paths and "/v1/models/" not in paths
        for known in paths:
            answer = await get(known.replace("{model}", "tiny"))
            assert answer.status_code in (200, 405), known


async def test_answers_are_counted_under_the_routes_template():
    service, recorder = make_service(FakeRouter())
    async with client_of(service) as client:
        await client.get("/v1/models/tiny")
    assert recorder.answers == [("/v1/models/{model}", 200)]
