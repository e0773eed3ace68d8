"""Two replicas in one service: second turns land where the first are cached, though that one is busier."""

import concurrent.futures
import re
import threading

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model

NUM_CHATS = 20
PROMPT_LEN = 192
PLACEMENTS = re.compile(r'eyrie_router_placements_total{[^}]*replica="([^"]+)"[^}]*} ([0-9.]+)')


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def body(model, token_ids, max_tokens, **more):
    return {"model": model, "prompt": token_ids, "max_tokens": max_tokens, "ignore_eos": True, **more}


def turn(client, model, token_ids):
    """Return (replica, usage) of one turn."""
    before = placements(client)
    answer = client.post("/v1/completions", json=body(model, token_ids, 8))
    assert answer.status_code == 200, answer.text
    after = placements(client)
    (replica,) = [name for name in after if after[name] > before.get(name, 0)]
    return replica, answer.json()["usage"]


def keep_busy(url, model, token_ids, begun, stop):
    """Stream a long answer to the same chat: it goes to the holder of the chat's pages and stays there."""
    request = body(model, token_ids, 1500, stream=True)
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                begun.set()
            if stop.is_set():
                return


def placements(client):
    return {replica: float(count) for replica, count in PLACEMENTS.findall(client.get("/metrics").text)}


@pytest.mark.timeout(400)
def test_second_turns_land_on_the_busier_holder_and_say_so(model):
    flags = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.1", "--num-replicas", "2"]
    first, second, cached = {}, {}, {}
    prompts = {
        n: [1000 + (n * 1009 + place * 17) % 30_000 for place in range(PROMPT_LEN)] for n in range(NUM_CHATS)
    }
    with EyrieProcess(model, *flags) as eyrie, concurrent.futures.ThreadPoolExecutor() as pool:
        url = eyrie.url()
        client = httpx.Client(base_url=url, timeout=60)
        for number, prompt in prompts.items():
            first[number], _ = turn(client, model, prompt)
        for number, prompt in prompts.items():
            begun, stop = threading.Event(), threading.Event()
            busy = pool.submit(keep_busy, url, model, prompt, begun, stop)
            assert begun.wait(30)
            second[number], usage = turn(client, model, [*prompt, *range(50, 70)])
            cached[number] = usage["prompt_tokens_details"]["cached_tokens"]
            stop.set()
            busy.result(30)
        client.close()
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []
    assert len(set(first.values())) == 2, "both replicas hold chats"
    assert sum(first[n] == second[n] for n in first) >= 0.95 * NUM_CHATS
    assert sum(cached[n] == PROMPT_LEN for n in cached) >= 0.95 * NUM_CHATS
