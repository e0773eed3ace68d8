import json
import threading

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request

from cluster.api.app import create_app
from cluster.api.errors import ApiError
from cluster.api.json_body import MAX_BODY_BYTES, read_body
from cluster.api.schemas import ChatCompletionRequest, CompletionRequest, Message
from cluster.api.text_threads import NUM_PROMPT_THREADS, TextThreads
from tests.unit.api_fakes import FakeRouter, make_service, says

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "tiny", "prompt": "hello"}


async def post(path, content, headers=None, router=None):
    service, _ = make_service(router or FakeRouter(says("x")))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(service)), base_url="http://api"
    ) as client:
        response = await client.post(
            path, content=content, headers={"content-type": "application/json", **(headers or {})}
        )
    service.threads.close()
    return response


def assert_error(response, status, param, code=None):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["message"] and "Traceback" not in error["message"]
    return error["message"]


CHAT_FAULTS = [
    ({"messages": []}, "messages", "a list of 1 to 4096 objects (found an empty list)"),
    ({"messages": None}, "messages", "a list of 1 to 4096 objects (found null)"),
    ({"messages": "hi"}, "messages", "a list of 1 to 4096 objects (found 'hi')"),
    ({"messages": ["hi"]}, "messages[0]", "an object with fields out of role, content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'assistant'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'text'"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "not known"),
    ({"messages": [{"role": "user", "content": "explode"}]}, "messages", "no explosions"),
    ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages", "127"),
    ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, "messages", "at least"),
    ({"model": 7}, "model", "must be a string (found 7)"),
    ({"unheard_of": 1}, "unheard_of", "not known to the server; remove it"),
    ({"max_token": 1}, "max_token", "did you mean `max_tokens`?"),
    ({"stop_sequences": ["x"]}, "stop_sequences", "did you mean `stop`?"),
    ({"stop_token_id": [1]}, "stop_token_id", "did you mean `stop_token_ids`?"),
    ({"Temperature": 1}, "Temperature", "did you mean `temperature`?"),
    ({"messages": [{"rol": "user"}]}, "messages[0].rol", "did you mean `role`?"),
    (
        {"stream": True, "stream_options": {"include_useage": True}},
        "stream_options.include_useage",
        "include_usage",
    ),
    ({"temperature": -0.1}, "temperature", "a number from 0 to 2 (found -0.1)"),
    ({"temperature": 2.1}, "temperature", "a number from 0 to 2 (found 2.1)"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "a number above 0, at most 1 (found 0)"),
    ({"usage_details": True, "stream": True}, "usage_details", "'include_usage': true"),
    ({"n": 0}, "n", "an integer from 1 to 128 (found 0)"),
    ({"n": 129}, "n", "128"),
    ({"n": 1.0}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "an integer from 1 to 2147483647 (found 0)"),
    ({"max_tokens": 500}, "max_tokens", "at most"),
    ({"max_completion_tokens": 500}, "max_completion_tokens", "at most"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most 2"),
    ({"stop": ["a"] * 1000}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "1 to 1024"),
    ({"stop": [1]}, "stop", "list of strings"),
    ({"logprobs": 5}, "logprobs", "true or false (found 5)"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "digits"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"400": 1}}, "logit_bias", "0 to 399"),
    ({"stop_token_ids": [400]}, "stop_token_ids", "0 to 399"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "0 or more"),
    ({"seed": 2**64}, "seed", "an integer from -9223372036854775808 to 9223372036854775807"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not known"),
    ({"stream": "yes"}, "stream", "true or false (found 'yes')"),
    ({"priority": 101}, "priority", "0 (first) to 100"),
    ({"priority": -1}, "priority", "0 (first) to 100 (found -1)"),
    ({"priority": 1.0}, "priority", "integer"),
    ({"priority": True}, "priority", "integer"),
    ({"cache_salt": ""}, "cache_salt", "1 to 256 characters"),
    ({"cache_salt": "x" * 257}, "cache_salt", "1 to 256 characters"),
    ({"cache_salt": ["x"]}, "cache_salt", "a string"),
    ({"repetition_penalty": 1e-46}, "repetition_penalty", "a number from 0.01 to 100"),
    ({"repetition_penalty": 101}, "repetition_penalty", "100 (found 101)"),
    ({"messages": [{"content": "x"}] * 3}, "messages[0].role", "required"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "4096"),
    ({"u" * 10_000: 1}, "u" * 64 + "...", "not known"),
    ({"messages": [{"m" * 10_000: 1}]}, f"messages[0].{'m' * 64}...", "not known"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "auto"}, "tool_choice", "'none'"),
    ({"response_format": {"type": "json_object"}}, "response_format", "text"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "text"),
]


@pytest.mark.parametrize(("fields", "param", "says_what"), CHAT_FAULTS)
async def test_a_fault_in_a_chat_is_a_400_that_names_the_field_and_what_is_allowed(fields, param, says_what):
    router = FakeRouter(says("x"))
    response = await post("/v1/chat/completions", json.dumps({**CHAT, **fields}), router=router)
    assert says_what in assert_error(response, 400, param)
    assert router.streams == []


COMPLETION_FAULTS = [
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": [1, "a"]}, "prompt", "token ids"),
    ({"prompt": [1, -1]}, "prompt", "0 or more"),
    ({"prompt": [1, True]}, "prompt", "integers"),
    ({"prompt": {"text": "a"}}, "prompt", "a string"),
    ({"prompt": [399, 400]}, "prompt", "0 to 399"),
    ({"prompt": [1] * 128}, "prompt", "128 tokens"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "found 130"),
    ({"logprobs": 6}, "logprobs", "5"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"echo": True, "logprobs": 1}, "logprobs", "echo"),
    ({"suffix": "x"}, "suffix", "must be null (found 'x')"),
    ({"best_of": 2}, "best_of", "must be 1 (found 2)"),
    ({"max_completion_tokens": 2}, "max_completion_tokens", "did you mean `max_tokens`?"),
]


@pytest.mark.parametrize(("fields", "param", "says_what"), COMPLETION_FAULTS)
async def test_a_fault_in_a_completion_is_a_400_that_names_the_field(fields, param, says_what):
    response = await post("/v1/completions", json.dumps({**TEXT, **fields}))
    assert says_what in assert_error(response, 400, param)


WRONG = [{}, [], "", "wrong", -1, 0.5, 10**30, 1e300, True, [[None]], {"x": None}]
PYDANTICS_WORDS = ("Input", "input", "valid ", "should", "dictionary", "instance", "None", "Extra", "boolean")


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
def test_no_fault_is_told_in_the_validators_own_words(schema):
    good = CHAT if schema is ChatCompletionRequest else TEXT
    bodies = [{**good, field: wrong} for field in schema.model_fields for wrong in WRONG]
    bodies += [{**good, "stream": True, "stream_options": {"include_usage": wrong}} for wrong in WRONG]
    if schema is ChatCompletionRequest:
        message = CHAT["messages"][0]
        fields = Message.model_fields
        bodies += [{**good, "messages": [{**message, field: wrong}]} for field in fields for wrong in WRONG]
        bodies += [{**good, "messages": [wrong]} for wrong in WRONG]
    num_faults = 0
    for body in bodies:
        try:
            schema.from_json(dict(body))
        except ApiError as error:
            num_faults += 1
            assert error.param and error.message.startswith(f"'{error.param}': ")
            assert not [word for word in PYDANTICS_WORDS if word in error.message], error.message
    assert num_faults > 100


HARMLESS = {
    "user": "someone",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "tools": None,
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "temperature": None,
    "stop": None,
    "logit_bias": None,
    "n": None,
}


async def test_fields_that_openai_ignores_and_nulls_are_accepted():
    response = await post("/v1/chat/completions", json.dumps({**CHAT, **HARMLESS}))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b'{"model": "tiny", "temperature": NaN}',
        b'{"model": "tiny", "temperature": 1e999}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model":' * 50_000,
        b"[" * 200_000,
        b'{"n": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda content: content[:24].decode("latin-1"),
)
async def test_what_is_not_json_is_a_400(content):
    response = await post("/v1/completions", content)
    assert_error(response, 400, None, "invalid_json")


MANY_KEYS = {f"k{number}": 1 for number in range(100_000)}
MANY_FAULTS = [
    ({**CHAT, **MANY_KEYS}, "k0"),
    ({**CHAT, "messages": [MANY_KEYS]}, "messages[0].k0"),
    ({**CHAT, "stream": True, "stream_options": MANY_KEYS}, "stream_options.k0"),
    ({**CHAT, "messages": [{}] * 4096}, "messages[0].role"),
    ({**CHAT, "messages": [{"role": "user", "content": "x", "mood": 1}] * 4096}, "messages[0].mood"),
    (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", **MANY_KEYS}]}]},
        "messages[0].content",
    ),
]


@pytest.mark.parametrize(("body", "param"), MANY_FAULTS, ids=[param for _, param in MANY_FAULTS])
def test_the_first_of_many_faults_is_enough(body, param):
    # Collecting every fault held the interpreter for up to half a second.
    with pytest.raises(ApiError) as refused:
        ChatCompletionRequest.from_json(dict(body))
    assert refused.value.param == param
    faults = refused.value.__context__
    assert not isinstance(faults, ValidationError) or faults.error_count() <= 2  # of one message


async def test_a_body_is_read_no_further_than_its_first_unknown_key():
    # What follows is no JSON at all, which nobody may notice.
    content = b'{"model": "tiny", "k0": 1, "k1": 2' + b"?" * 100_000
    assert_error(await post("/v1/completions", content), 400, "k0", "unknown_parameter")


async def test_missing_fields_are_named():
    response = await post("/v1/completions", b"{}")
    message = assert_error(response, 400, "model", "missing_required_parameter")
    assert message == "'model': this field is required (a string)."


async def test_an_unknown_model_is_a_404():
    response = await post("/v1/completions", json.dumps({**TEXT, "model": "gpt-9"}))
    assert "'tiny'" in assert_error(response, 404, "model", "model_not_found")


async def test_a_prompt_too_long_says_both_numbers():
    response = await post("/v1/completions", json.dumps({**TEXT, "prompt": [1] * 300}))
    message = assert_error(response, 400, "prompt", "context_length_exceeded")
    assert "128" in message and "300" in message


async def test_another_media_type_is_a_415():
    response = await post("/v1/completions", json.dumps(TEXT), {"content-type": "text/plain"})
    assert_error(response, 415, "Content-Type")


async def test_a_body_announced_too_large_is_refused_before_it_is_read():
    response = await post("/v1/completions", b"{}", {"content-length": str(100 * 2**20)})
    assert str(MAX_BODY_BYTES) in assert_error(response, 413, None)


async def test_a_body_that_grows_too_large_is_refused_as_soon_as_it_does():
    taken = 0

    async def endless():
        nonlocal taken
        while True:
            taken += 1
            yield b" " * 2**20

    response = await post("/v1/completions", endless())
    assert_error(response, 413, None)
    assert taken <= MAX_BODY_BYTES // 2**20 + 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/nowhere", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/gpt-9", 404),
    ],
)
async def test_unknown_paths_and_methods_get_json_errors(method, path, status):
    service, _ = make_service(FakeRouter())
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(service)), base_url="http://api"
    ) as client:
        response = await client.request(method, httpx.URL("http://api", path=path))
    assert response.status_code == status
    assert response.json()["error"]["request_id"] == response.headers["x-request-id"]


class HastyThreads(TextThreads):
    """Counts the jobs that leave the event loop; gives them less time than they are promised."""

    num_jobs = 0

    async def run_prompt(self, job, timeout_s):
        self.num_jobs += 1
        return await super().run_prompt(job, timeout_s / 100)


def a_call(content):
    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)


@pytest.mark.parametrize(("num_spaces", "num_jobs"), [(0, 0), (12_000, 1)])
async def test_large_bodies_are_parsed_off_the_event_loop(num_spaces, num_jobs):
    content = json.dumps(TEXT).encode() + b" " * num_spaces
    threads = HastyThreads()
    body = await read_body(a_call(content), CompletionRequest, threads)
    threads.close()
    assert (body.prompt, threads.num_jobs) == (("hello",), num_jobs)


async def test_a_body_waits_for_busy_threads_only_so_long():
    threads = HastyThreads()
    release = threading.Event()
    for _ in range(NUM_PROMPT_THREADS):
        threads.prompts.submit(release.wait, 10)
    try:
        with pytest.raises(ApiError, match="within 30 s") as refused:
            await read_body(a_call(b" " * 100_000), CompletionRequest, threads)
    finally:
        release.set()
        threads.close()
    assert (refused.value.status, refused.value.code) == (503, "prompt_timeout")
