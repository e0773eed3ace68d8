"""A small service at its limits: a full queue and SIGTERM under load, through the `openai` client."""

import asyncio

import httpx
import openai
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model
from tests.e2e.openai_service import OpenAIService

LONG = {"model": "tiny", "prompt": "the cat", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
NUM_STREAMS = 16


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    shape = ("--load-format", "dummy", "--served-model-name", "tiny", "--kv-gb", "0.05")
    return (str(model), *shape, "--port", "0", "--kv-sanitizer")


async def opened(client, num):
    """Open streams that run for long."""
    return [await client.completions.create(**LONG, stream=True) for _ in range(num)]


async def becomes_unready(http):
    """Wait until `/ready` says that the service drains."""
    async with asyncio.timeout(20):
        while True:
            response = await http.get("/ready")
            if response.status_code == 503:
                assert response.json()["reason"] == "draining"
                return
            await asyncio.sleep(0.02)


@pytest.mark.timeout(300)
async def test_a_full_queue_is_a_429_with_retry_after_and_hanging_up_makes_room(arguments):
    limits = ("--max-running-requests", "2", "--max-waiting-requests", "2")
    with EyrieProcess(*arguments, *limits) as eyrie:
        service = OpenAIService(eyrie)
        async with service.async_client() as client, httpx.AsyncClient(base_url=service.url) as http:
            streams = await opened(client, 2)
            for stream in streams:
                assert (await anext(aiter(stream))).choices  # both run: the next two will wait
            streams += await opened(client, 2)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(**LONG)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "overloaded"
            assert (await http.get("/ready")).status_code == 200
            for stream in streams:  # two running, two queued
                await stream.close()
            samples = await asyncio.to_thread(service.idle_metrics)
            assert samples["eyrie_worker_requests_total{finish_reason=abort}"] == 4
            assert samples["eyrie_kv_pages{state=owned}"] == samples["eyrie_kv_cached_pages"]
            answer = await client.completions.create(model="tiny", prompt="the cat", max_tokens=3)
            assert answer.usage.completion_tokens >= 1


@pytest.mark.timeout(300)
async def test_sigterm_under_load_drains_then_ends_the_rest_with_a_finish_reason(arguments):
    with EyrieProcess(*arguments, "--drain-s", "2") as eyrie:
        service = OpenAIService(eyrie)
        async with service.async_client() as client, httpx.AsyncClient(base_url=service.url) as http:
            streams = await opened(client, NUM_STREAMS)
            eyrie.terminate()
            await becomes_unready(http)
            with pytest.raises(openai.InternalServerError) as caught:
                await client.completions.create(model="tiny", prompt="the", max_tokens=1)
            assert (caught.value.status_code, caught.value.code) == (503, "draining")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert (await http.get("/health")).status_code == 200
            reasons = [[chunk.choices[0].finish_reason async for chunk in stream][-1] for stream in streams]
        assert len(reasons) == NUM_STREAMS
        assert set(reasons) <= {"shutdown", "length"} and "shutdown" in reasons
        assert await asyncio.to_thread(eyrie.wait) == 0
        assert await asyncio.to_thread(eyrie.leftovers) == []
