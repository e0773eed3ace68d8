import dataclasses
import json

import httpx
import pytest

from cluster.api.app import create_app
from tests.unit.api_fakes import FakeRouter, events, library_tokenizer, make_service, says

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def client_of(service):
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://api")


async def chat(router, **fields):
    service, recorder = make_service(router)
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, **fields})
    return response, recorder


async def test_a_chat_is_answered_with_text_finish_reason_and_usage():
    router = FakeRouter(says("the cat sat", cached=3))
    response, _ = await chat(router)
    answer = response.json()
    assert response.status_code == 200
    assert answer["object"] == "chat.completion"
    assert answer["created"] == 1_800_000_000
    assert answer["model"] == "tiny"
    choice = answer["choices"][0]
    assert choice["message"] == {"content": "the cat sat", "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    prompt_len = len(router.streams[0].request.token_ids)
    generated_len = len(library_tokenizer().encode("the cat sat").ids) + 1  # the end token was generated, too
    assert answer["usage"] == {
        "prompt_tokens": prompt_len,
        "completion_tokens": generated_len,
        "total_tokens": prompt_len + generated_len,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_the_prompt_is_the_rendered_template_with_the_system_role_for_developers():
    router = FakeRouter(says("x"))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "again", "name": "bob"},
    ]
    await chat(router, messages=messages)
    prompt = library_tokenizer().decode(router.streams[0].request.token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|start|>system\nbe brief<|end|>\n<|start|>user\nhello<|end|>\n<|start|>assistant\nhi<|end|>\n"
        "<|start|>user\nagain<|end|>\n<|start|>assistant\n"
    )


async def test_sampling_fields_reach_the_worker_and_choices_get_their_own_seeds():
    router = FakeRouter(says("x"))
    await chat(
        router,
        n=3,
        seed=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "6": 2.5},
        max_completion_tokens=20,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
        priority=3,
    )
    requests = [stream.request for stream in router.streams]
    assert [request.sampling.seed for request in requests] == [7, 8, 9]
    assert len({request.request_id for request in requests}) == 3
    sampling = requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.2, [(5, -100.0), (6, 2.5)])
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (20, 2, True)
    assert (sampling.stop_token_ids, sampling.num_logprobs) == ([9], None)
    assert requests[0].priority == 3


async def test_a_stream_sends_role_text_finish_and_usage():
    router = FakeRouter(says("naïve 🎉 cat", cached=2))
    response, recorder = await chat(router, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == "naïve 🎉 cat"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons.count("stop") == 1 and reasons[-1] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [summary.finish_reason for summary in recorder.summaries] == ["stop"]
    assert len(recorder.first_tokens) == 1 and len(recorder.gaps) > 1


@pytest.mark.parametrize("streams", [False, True])
async def test_usage_tells_what_became_of_drafts_where_the_call_asks(streams):
    router = FakeRouter(says("the cat sat", step=3, num_drafts=4))
    asked = {"stream": True, "stream_options": {"include_usage": True}} if streams else {}
    num_tokens = len(library_tokenizer().encode("the cat sat").ids) + 1
    lens = [min(3, num_tokens - start) for start in range(0, num_tokens, 3)]
    response, _ = await chat(router, n=2, usage_details=True, **asked)
    usage = (events(response.text)[-1] if streams else response.json())["usage"]
    num_accepted = 2 * sum(length - 1 for length in lens)
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": num_accepted,
        "rejected_prediction_tokens": 2 * 4 * len(lens) - num_accepted,
    }
    response, _ = await chat(FakeRouter(says("x", num_drafts=4)), **asked)
    usage = (events(response.text)[-1] if streams else response.json())["usage"]
    assert "completion_tokens_details" not in usage, "nobody asked"


async def test_usage_is_absent_from_streams_that_did_not_ask():
    response, _ = await chat(FakeRouter(says("x")), stream=True)
    assert all("usage" not in chunk for chunk in events(response.text))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_cuts_the_text_and_aborts_the_request(stream, step):
    router = FakeRouter(says("the cat sat on the mat", step=step, finish="length"))
    response, recorder = await chat(router, stop=["t on", "never"], stream=stream, logprobs=True)
    if stream:
        choices = [choice for chunk in events(response.text) for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        tokens = [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]
        reason = choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        tokens = choice["logprobs"]["content"]
    assert (text, reason) == ("the cat sa", "stop")
    assert "".join(token["token"] for token in tokens) in ("the cat sa", "the cat sat")
    assert router.streams[0].aborted == ["stop"]
    assert [summary.finish_reason for summary in recorder.summaries] == ["stop"]


async def test_stop_strings_do_not_count_before_min_tokens():
    response, _ = await chat(FakeRouter(says("zqzqzq")), stop=["q"], min_tokens=2)
    assert response.json()["choices"][0]["message"]["content"] == "zqz"


async def test_tokens_after_a_stop_string_in_the_same_step_are_neither_shown_nor_counted():
    response, _ = await chat(FakeRouter(says("zqzqzq", step=50)), stop=["qz"])
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "z"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


async def test_logprobs_carry_bytes_and_alternatives():
    response, _ = await chat(FakeRouter(says("🎉")), logprobs=True, top_logprobs=2)
    tokens = response.json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]) == "🎉".encode()
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert all(token["logprob"] == -0.5 for token in tokens)


async def test_n_choices_are_told_apart_in_answers_and_streams():
    words = iter(["one", "two", "three"] * 2)
    router = FakeRouter(lambda stream: says(next(words))(stream))
    response, _ = await chat(router, n=3)
    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["one", "two", "three"]
    response, _ = await chat(router, n=3, stream=True)
    streamed = {0: "", 1: "", 2: ""}
    for chunk in events(response.text):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == {0: "one", 1: "two", 2: "three"}


@pytest.mark.parametrize("reason", ["length", "shutdown"])
async def test_other_finish_reasons_reach_the_client_with_the_text(reason):
    response, _ = await chat(FakeRouter(says("hello", finish=reason)))
    assert response.json()["choices"][0]["finish_reason"] == reason
    assert response.json()["choices"][0]["message"]["content"] == "hello"


async def test_a_replica_that_fails_midway_ends_the_stream_with_a_finish_and_an_error_event():
    def script(stream):
        yield stream.output()
        yield stream.output(library_tokenizer().encode("the").ids)
        yield stream.output(finish="error", error="worker died")

    response, recorder = await chat(FakeRouter(script), stream=True)
    *_, last, failure = events(response.text)
    assert last["choices"][0]["finish_reason"] == "error"
    assert failure["error"]["code"] == "replica_failed"
    assert "worker died" in failure["error"]["message"]
    assert failure["error"]["request_id"] == response.headers["x-request-id"]
    assert [summary.finish_reason for summary in recorder.summaries] == ["error"]


async def test_a_replica_that_fails_midway_makes_a_whole_answer_a_503():
    def script(stream):
        yield stream.output()
        yield stream.output(finish="error", error="worker died")

    router = FakeRouter(script)
    response, _ = await chat(router, n=2)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_failed"
    assert all(stream.closed for stream in router.streams)


async def test_a_bug_midway_ends_the_stream_without_its_details():
    def script(stream):
        yield stream.output()
        yield "not an output, SECRET"

    response, recorder = await chat(FakeRouter(script), stream=True, n=2)
    *_, first, second, failure = events(response.text)
    assert {first["choices"][0]["index"], second["choices"][0]["index"]} == {0, 1}
    assert first["choices"][0]["finish_reason"] == second["choices"][0]["finish_reason"] == "error"
    assert [summary.finish_reason for summary in recorder.summaries] == ["error", "error"]
    assert failure["error"]["type"] == "server_error"
    assert "SECRET" not in response.text and "Traceback" not in response.text


async def test_answers_are_plain_json_objects():
    response, _ = await chat(FakeRouter(says("x")))
    assert json.loads(response.content)["id"].startswith("chatcmpl-req-b00t-")


async def test_a_model_without_a_chat_template_says_where_to_go():
    service, _ = make_service(FakeRouter(says("x")))
    service = dataclasses.replace(service, model=dataclasses.replace(service.model, chat_template=None))
    async with client_of(service) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
