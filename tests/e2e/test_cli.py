"""`eyrie serve` from start to end: what it prints, how it stops, what is left afterwards."""

import concurrent.futures
import json
import time

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, is_listening, tiny_model

API_KEY = "sk-planted-0123456789"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def body(model, max_tokens, **more):
    return {"model": model, "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, **more}


def headers():
    return {"authorization": f"Bearer {API_KEY}"}


def complete(url, model, max_tokens):
    return httpx.post(f"{url}/v1/completions", json=body(model, max_tokens), headers=headers(), timeout=60)


def stream(url, model, max_tokens, begun):
    """Return (finish reason, number of chunks with text) of a streamed completion."""
    reason, num_chunks = None, 0
    request = body(model, max_tokens, stream=True)
    with httpx.stream("POST", f"{url}/v1/completions", json=request, headers=headers(), timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            num_chunks += bool(choice["text"])
            begun.set()
            reason = choice["finish_reason"] or reason
    return reason, num_chunks


def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_service_announces_itself_drains_on_sigterm_and_leaves_nothing(model):
    from threading import Event

    arguments = [
        model, "--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--drain-s", "2",
        "--no-graphs", "--kv-sanitizer", "--checked",  # the long answer outlasts the drain on any machine
    ]  # fmt: skip
    with EyrieProcess(*arguments, environment={"EYRIE_API_KEYS": API_KEY}) as eyrie:
        url = eyrie.url()
        port = int(url.rpartition(":")[2])
        assert httpx.get(f"{url}/ready").status_code == 200
        assert complete(url, model, 4).json()["choices"][0]["finish_reason"] == "length"
        targets = httpx.get(f"{url}/metrics/targets").json()
        texts = [httpx.get(f"http://{target['targets'][0]}/metrics").text for target in targets]
        assert len(texts) == 2
        assert len({target["labels"]["node"] for target in targets}) == 1
        assert any("eyrie_kv_pages" in text for text in texts)
        assert any('eyrie_requests_total{finish_reason="length"' in text for text in texts)

        short, long, long_begun = Event(), 1900, Event()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ending = pool.submit(stream, url, model, long, long_begun)
            finishing = pool.submit(stream, url, model, 10, short)
            assert long_begun.wait(20) and short.wait(20)
            eyrie.terminate()
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            refused = complete(url, model, 4)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert finishing.result(30)[0] == "length"
            reason, num_chunks = ending.result(30)
        assert reason == "shutdown"
        assert 0 < num_chunks < long
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []
        assert not is_listening(port)

    assert eyrie.stdout == [f"ready {url}"]
    log = "\n".join(eyrie.stderr)
    assert log.count("configuration: ") == 1
    assert '"cluster_secret": "***"' in log
    assert '"api_keys": "***"' in log
    assert "planted" not in log
    assert "Traceback" not in log


@pytest.mark.timeout(300)
def test_a_second_signal_cuts_the_drain_short(model):
    from threading import Event

    arguments = [model, "--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--drain-s", "600"]
    with EyrieProcess(*arguments, environment={"EYRIE_API_KEYS": API_KEY}) as eyrie:
        url = eyrie.url()
        begun = Event()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ending = pool.submit(stream, url, model, 1900, begun)
            assert begun.wait(20)
            eyrie.interrupt()
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert not ending.done()
            eyrie.interrupt()
            assert ending.result(30)[0] == "shutdown"
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


@pytest.mark.timeout(300)
def test_too_little_memory_is_told(model):
    arguments = [model, "--load-format", "dummy", "--port", "0", "--kv-gb", "100000"]
    with EyrieProcess(*arguments, environment={"EYRIE_API_KEYS": API_KEY}) as eyrie:
        assert eyrie.wait(120) == 1
        assert eyrie.leftovers() == []
    assert eyrie.stdout == []
    told = [line for line in eyrie.stderr if line.startswith("eyrie: ")]
    assert any("kv_gb" in line and "GiB" in line for line in told), told
