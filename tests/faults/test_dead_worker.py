"""A killed rank that is not restarted: its requests end with a documented error, the other replica serves on.

And signals to every process at once.
"""

import concurrent.futures
import json
import threading
import time

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DECODING_TOKENS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def stream(url, model, prompt, begun):
    """Return (last finish reason, error code) of a long streamed completion."""
    reason = code = None
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": DECODING_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                code = event["error"]["code"]
            else:
                begun.set()
                reason = event["choices"][0]["finish_reason"] or reason
    return reason, code


def start_streams(pool, url, model, prompts):
    begun = [threading.Event() for _ in prompts]
    streams = [pool.submit(stream, url, model, p, b) for p, b in zip(prompts, begun, strict=True)]
    assert all(one.wait(30) for one in begun)
    return streams


def complete(url, model):
    body = {"model": model, "prompt": "again", "max_tokens": 3, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_one_of_two_replicas_dies_then_the_other(model):
    flags = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--num-replicas", "2"]
    flags += ["--max-restarts", "0"]
    with EyrieProcess(model, *flags) as eyrie, concurrent.futures.ThreadPoolExecutor() as pool:
        url = eyrie.url()
        workers = eyrie.members("ray::Worker")
        assert len(workers) == 2
        streams = start_streams(pool, url, model, ["one way", "and the other"])
        workers[0].kill()
        ends = sorted([one.result(60) for one in streams], key=str)
        assert ends == [("error", "replica_failed"), ("length", None)]

        assert httpx.get(f"{url}/ready").status_code == 200
        for _ in range(3):
            assert complete(url, model).status_code == 200

        [last] = start_streams(pool, url, model, ["the last one"])
        workers[1].kill()
        assert last.result(60) == ("error", "replica_failed")
        assert eyrie.wait() == 1
        assert eyrie.leftovers() == []
    assert any("no replica is left" in line for line in eyrie.stderr)


@pytest.mark.parametrize(
    "draft", [[], ["--draft", "random-eagle3", "--draft-tokens", "3"]], ids=["plain", "draft"]
)
def test_a_dead_follower_ends_its_group(model, draft):
    """Rank 0 cannot go on alone: it says so to its clients and ends."""
    flags = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--tp-size", "2", *draft]
    flags += ["--max-restarts", "0"]
    with EyrieProcess(model, *flags) as eyrie, concurrent.futures.ThreadPoolExecutor() as pool:
        url = eyrie.url()
        assert complete(url, model).status_code == 200
        [running] = start_streams(pool, url, model, ["to be cut off"])
        busiest = sorted(eyrie.members("ray::Worker"), key=lambda worker: worker.create_time())
        assert len(busiest) == 2
        begin = time.monotonic()
        busiest[1].kill()
        assert running.result(60) == ("error", "replica_failed")
        assert time.monotonic() - begin < 30
        assert eyrie.wait() == 1
        assert eyrie.leftovers() == []


@pytest.mark.parametrize("reach", ["group", "each"])
def test_a_signal_to_every_process_at_once_ends_all(model, reach):
    """As a service manager stops a group: Ray's own processes end before Eyrie can ask them anything."""
    flags = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--host-cache-gb", "0.03"]
    with EyrieProcess(model, *flags) as eyrie, concurrent.futures.ThreadPoolExecutor() as pool:
        url = eyrie.url()
        assert complete(url, model).status_code == 200
        running = start_streams(pool, url, model, ["one way", "and the other"])
        if reach == "group":
            eyrie.terminate_group()
        else:
            eyrie.terminate_each()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []
        for one in running:  # whether with last words or cut off
            assert one.exception(60) is None or isinstance(one.exception(), httpx.HTTPError)


def test_a_killed_ray_ends_the_service(model):
    flags = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--host-cache-gb", "0.03"]
    with EyrieProcess(model, *flags) as eyrie:
        eyrie.url()
        [raylet] = [process for process in eyrie.family.values() if process.name() == "raylet"]
        raylet.kill()
        assert eyrie.wait() == 1
        assert eyrie.leftovers() == []
    assert any("Ray's own processes have ended" in line for line in eyrie.stderr)
