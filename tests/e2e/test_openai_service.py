"""The service as its users see it: the `openai` client against a running `eyrie serve` of the real model."""

import asyncio
import json
import socket
import time
import uuid

import httpx
import openai
import pytest

from tests.e2e.eyrie_process import EyrieProcess
from tests.e2e.openai_service import OpenAIService

pytestmark = pytest.mark.timeout(300)

MODEL = "smollm2-135m"
KEY, OTHER_KEY = "planted-key-one", "planted-key-two"
PLANTED_PROMPT = "zanzibar-ptarmigan-quokka"
PLANTED_TOKENS = [48_911, 48_797, 48_653, 48_541]
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def service():
    arguments = ["--dtype", "float32", "--max-context-len", "1024", "--port", "0", "--kv-sanitizer"]
    with EyrieProcess(*arguments, environment={"EYRIE_API_KEYS": f"{KEY},{OTHER_KEY}"}) as eyrie:
        yield OpenAIService(eyrie)
        eyrie.terminate()
        assert eyrie.wait() == 0


@pytest.fixture(scope="module")
def client(service):
    return service.client(KEY)


def ask(client, **fields):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": FRANCE, "max_tokens": 12, "temperature": 0, **fields}
    )


def test_the_real_model_answers_a_question(client):
    answer = ask(client)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_and_ends_with_usage(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_repeated_prompt_is_cached_for_its_own_key_only(service, client):
    messages = [{"role": "user", "content": f"{uuid.uuid4()} tell me about the sea, please. " * 4}]
    counts = []
    for one in (client, client, service.client(OTHER_KEY)):
        usage = ask(one, messages=messages, max_tokens=1).usage
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] < 32 < counts[1]
    assert counts[2] < 32


def test_choices_of_a_seeded_call_are_reproducible_and_differ(client):
    def texts(**fields):
        answer = ask(client, temperature=1.0, max_tokens=10, **fields)
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=11)
    assert three == texts(n=3, seed=11)
    assert len(set(three)) > 1
    assert texts(seed=12) == [three[1]]  # choice i has seed + i


def test_stop_strings_cut_across_tokens_in_streams_and_answers(client):
    full = ask(client).choices[0].message.content
    stop = "tal of Fr"
    expected = full[: full.index(stop)]
    answer = ask(client, stop=[stop, "never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = list(ask(client, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_chat_logprobs_describe_the_greedy_tokens(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob < 0
        assert bytes(token.bytes).decode() == token.token


def test_completions_take_text_and_tokens_and_lists_of_both(client):
    def complete(prompt, **fields):
        answer = client.completions.create(
            **{"model": MODEL, "prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}
        )
        return [choice.text for choice in answer.choices]

    (text,) = complete("The capital of France is")
    assert "Paris" in text
    assert complete(["The capital of France is", "One, two, three,"])[0] == text
    assert len(complete([[1, 2, 3], [4, 5]], n=2)) == 4
    assert complete("The capital of France is", echo=True) == ["The capital of France is" + text]
    with_logprobs = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0, logprobs=2
    ).choices[0]
    assert "".join(with_logprobs.logprobs.tokens) == with_logprobs.text
    assert len(with_logprobs.logprobs.top_logprobs[0]) == 2


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 1000}, openai.BadRequestError, "n"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"stop": ["x"] * 1000}, openai.BadRequestError, "stop"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, openai.BadRequestError, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"misspelt": 1}}, openai.BadRequestError, "misspelt"),
    ],
)
def test_bad_requests_raise_the_clients_own_errors(client, fields, error, param):
    with pytest.raises(error) as caught:
        ask(client, **fields)
    assert caught.value.param == param
    assert caught.value.request_id
    assert "Traceback" not in str(caught.value)


def test_a_token_outside_the_vocabulary_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="49151"):
        client.completions.create(model=MODEL, prompt=[5, 49_152], max_tokens=1)


def test_a_body_of_100_mb_is_refused_without_being_read(service):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {100 * 2**20}\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096).splitlines()[0]


@pytest.mark.parametrize("key", ["", "planted-key-on", "other"])
def test_a_call_without_a_right_key_is_refused(service, key):
    with pytest.raises(openai.AuthenticationError):
        ask(service.client(key or "x"))
    assert httpx.get(f"{service.url}/v1/models").status_code == 401
    assert httpx.get(f"{service.url}/health").status_code == 200
    assert httpx.get(f"{service.url}/ready").status_code == 200


def test_request_ids_are_returned_and_logged(service, client):
    offered = f"test-{uuid.uuid4()}"
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=FRANCE, max_tokens=1, extra_headers={"x-request-id": offered}
    )
    assert raw.headers["x-request-id"] == offered
    deadline_s = time.monotonic() + 10
    while f"request_id={offered}" not in service.log():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


async def stream_then_hang_up(service, num_tokens):
    """Read a stream's first tokens, close the connection, return how many tokens were read."""
    async with service.async_client(KEY) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=FRANCE, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        num_read = 0
        async for chunk in stream:
            num_read += bool(chunk.choices and chunk.choices[0].delta.content)
            if num_read == num_tokens:
                break
        await stream.close()
    return num_read


def assert_idle_baseline(samples):
    assert samples["eyrie_kv_pages{state=owned}"] == samples["eyrie_kv_cached_pages"]
    assert samples["eyrie_kv_pages{state=quiescing}"] == 0


async def test_a_hang_up_ends_a_stream_within_two_steps_and_gives_its_pages_back(service):
    extra_steps = []
    for _ in range(3):  # the machine may be busy: the best of three counts
        before = service.idle_metrics()
        num_read = await stream_then_hang_up(service, 10)
        after = service.idle_metrics()
        assert_idle_baseline(after)
        steps = after["eyrie_step_seconds_count"] - before["eyrie_step_seconds_count"]
        extra_steps.append(steps - num_read)
        aborted = "eyrie_worker_requests_total{finish_reason=abort}"
        assert after[aborted] == before.get(aborted, 0) + 1
    assert min(extra_steps) <= 2 + 1, extra_steps  # two, and the empty one that carries the abort out


async def test_a_hang_up_ends_whole_answers_too(service):
    before = service.idle_metrics()
    async with service.async_client(KEY) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=2.0).chat.completions.create(
                model=MODEL, messages=FRANCE, max_tokens=900, n=2, extra_body={"ignore_eos": True}
            )
    after = service.idle_metrics(timeout_s=10)
    assert_idle_baseline(after)
    aborted = "eyrie_worker_requests_total{finish_reason=abort}"
    assert after[aborted] == before.get(aborted, 0) + 2


async def test_64_streams_at_once_all_finish(service):
    async def one(client, number):
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Say the number {number}."}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        return chunks[-1].usage.completion_tokens

    async with service.async_client(KEY) as client:
        counts = await asyncio.gather(*(one(client, number) for number in range(64)))
    assert counts == [8] * 64
    assert_idle_baseline(service.idle_metrics())


def test_no_key_prompt_or_token_id_reaches_any_log(service, client):
    ask(client, messages=[{"role": "user", "content": PLANTED_PROMPT}], stop=[PLANTED_PROMPT + "-stop"])
    client.completions.create(model=MODEL, prompt=PLANTED_TOKENS, max_tokens=2, logit_bias={"48653": 5})
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=PLANTED_PROMPT, extra_body={PLANTED_PROMPT: 1})
    with pytest.raises(openai.NotFoundError):
        ask(client, model=PLANTED_PROMPT)
    with pytest.raises(openai.AuthenticationError):
        ask(service.client("planted-key-wrong"))
    httpx.post(f"{service.url}/v1/completions", content=json.dumps(PLANTED_PROMPT))
    time.sleep(1.0)
    texts = service.all_logs()
    assert any("cluster.api.door: answered" in text for text in texts), "the logs are there"
    for text in texts:
        assert "planted-key" not in text
        assert PLANTED_PROMPT not in text
        assert "48911, 48797" not in text and "48911,48797" not in text
