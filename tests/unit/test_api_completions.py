import httpx

from cluster.api.app import create_app
from tests.unit.api_fakes import FakeRouter, events, library_tokenizer, make_service, says


async def complete(router, **fields):
    service, recorder = make_service(router)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(service)), base_url="http://api"
    ) as client:
        response = await client.post("/v1/completions", json={"model": "tiny", **fields})
    return response, recorder


def echo_worker(stream):
    """Answers with what it was asked, so that choices can be matched with prompts."""
    text = library_tokenizer().decode(stream.request.token_ids)
    return says(f"<{text}>")(stream)


async def test_text_and_token_prompts_give_one_choice_each_in_order():
    tokens = library_tokenizer().encode("world").ids
    router = FakeRouter(echo_worker)
    for prompt in (["hello", "cat"], [tokens, [5, 6]]):
        response, _ = await complete(router, prompt=prompt, n=2)
        answer = response.json()
        assert answer["object"] == "text_completion"
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts[0] == texts[1] != texts[2] == texts[3]
    assert router.streams[4].request.token_ids == tokens


async def test_usage_counts_a_prompt_once_and_all_choices():
    response, _ = await complete(FakeRouter(says("a", cached=1)), prompt=[[5, 6, 7], [8]], n=2)
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == 4
    assert usage["completion_tokens"] == 8  # 4 choices of one token and the end token
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_the_default_length_is_openais():
    router = FakeRouter(says("a"))
    await complete(router, prompt="a")
    assert router.streams[0].request.sampling.max_tokens == 16
    await complete(router, prompt=[1] * 120)
    assert router.streams[1].request.sampling.max_tokens == 8


async def test_echo_puts_the_prompt_first_whole_and_streamed():
    tokens = library_tokenizer().encode("hello world").ids
    for prompt in ("hello world", tokens):
        response, _ = await complete(FakeRouter(says(" the end")), prompt=prompt, echo=True)
        assert response.json()["choices"][0]["text"] == "hello world the end"
        response, _ = await complete(FakeRouter(says(" the end")), prompt=prompt, echo=True, stream=True)
        chunks = events(response.text)
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        assert text == "hello world the end"


async def test_logprobs_are_in_the_completions_format():
    response, _ = await complete(FakeRouter(says("zq🎉")), prompt="a", logprobs=2)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["z", "q"]
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert logprobs["token_logprobs"][0] == -0.5
    assert len(logprobs["top_logprobs"][0]) == 2
    lengths = {len(column) for column in logprobs.values()}
    assert len(lengths) == 1


async def test_zero_logprobs_means_the_chosen_token_alone():
    router = FakeRouter(says("zq"))
    response, _ = await complete(router, prompt="a", logprobs=0)
    assert router.streams[0].request.sampling.num_logprobs == 0
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"z": -0.5}, {"q": -0.5}]


async def test_a_stream_ends_with_usage_on_request():
    response, _ = await complete(
        FakeRouter(says("the cat")), prompt="a", stream=True, stream_options={"include_usage": True}
    )
    chunks = events(response.text)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "the cat"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 1
