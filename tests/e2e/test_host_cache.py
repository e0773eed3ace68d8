"""A service with a host cache: pages evicted from the device come back from the node's memory, unchanged."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model
from tests.unit.cache_nodes import SECRET, new_client, serving

FLAGS = [
    "--load-format", "dummy", "--port", "0", "--num-pages", "48", "--max-context-len", "512",
    "--host-cache-gb", "0.03", "--kv-sanitizer",
]  # fmt: skip
WAIT_S = 60.0
PROMPT = "of birds of prey " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def complete(url, model, prompt):
    """Return (text, cached tokens)."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def fill_device(url, model, name):
    """Have other prompts take every page of the device."""
    for number in range(3):
        complete(url, model, f"{name} {number} " + "and so on " * 90)


def cache_figures(log):
    """Ask the running server as a user does: with the secret's file and the endpoint that the log names."""
    (secret_file,) = re.findall(r"the host cache serves.* secret_file=(\S+)", log)
    (endpoint,) = re.findall(r"the host cache serves.* endpoint=(\S+)", log)
    command = [sys.executable, "-m", "cluster", "cache"]
    asked = subprocess.run(
        [*command, "show", "--secret-file", secret_file, "--endpoint", endpoint, "--json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    checked = subprocess.run(
        [*command, "check", "--secret-file", secret_file], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0 and checked.stdout.startswith("ok: "), checked.stderr
    return json.loads(asked.stdout)


def cache_metrics(url):
    """Return the cache server's metrics, found as Prometheus finds them."""
    targets = httpx.get(f"{url}/metrics/targets").json()
    (address,) = [
        address
        for target in targets
        if target["labels"].get("process") == "cache"
        for address in target["targets"]
    ]
    return httpx.get(f"http://{address}/metrics").text


def await_router(url, restarts):
    """Wait until the router follows the cache server of that many restarts, and knows its pages."""
    end_s = time.monotonic() + WAIT_S
    heard = re.compile(r"eyrie_router_cache_heard\{.*\} 1\.0")
    pages = re.compile(r"eyrie_router_host_pages\{.*\} (\d+)")
    heirs = re.compile(rf"eyrie_router_cache_restarts_total\{{.*\}} {restarts}\.0")
    while True:
        text = httpx.get(f"{url}/metrics").text
        if heard.search(text) and int(pages.search(text)[1]) > 60 and heirs.search(text):
            return
        assert time.monotonic() < end_s, [line for line in text.splitlines() if "eyrie_router" in line]
        time.sleep(0.1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "draft",
    [
        pytest.param([], id="plain"),
        pytest.param(["--draft", "random-eagle3", "--draft-tokens", "3"], id="draft", marks=pytest.mark.slow),
    ],
)
def test_pages_come_back_from_the_host_also_after_its_server_was_killed(model, draft):
    with EyrieProcess(model, *FLAGS, *draft) as eyrie:
        url = eyrie.url()
        text, cached = complete(url, model, PROMPT)
        assert cached == 0
        fill_device(url, model, "first")
        assert complete(url, model, PROMPT) == (text, 240)
        figures = cache_figures("\n".join(eyrie.stderr))
        assert figures["num_ready"] > 60 and figures["num_readers"] == 1
        assert 'eyrie_cache_slots{node="127.0.0.1",state="ready"}' in cache_metrics(url)
        await_router(url, restarts=0)

        (server,) = eyrie.members("ray::CacheServer")
        server.kill()
        fill_device(url, model, "second")
        assert complete(url, model, PROMPT) == (text, 240), "the dead server's pages are read all the same"
        end_s = time.monotonic() + WAIT_S
        while not any("the host cache serves again" in line for line in eyrie.stderr):
            assert time.monotonic() < end_s, "no new server"
            time.sleep(0.1)
        fill_device(url, model, "third")
        assert complete(url, model, PROMPT) == (text, 240)
        figures = cache_figures("\n".join(eyrie.stderr))
        assert figures["recovered"] > 60 and figures["num_readers"] == 1
        assert "eyrie_cache_recovered_pages_total" in cache_metrics(url), "at its old address"
        await_router(url, restarts=1)
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


def told_at_the_start(model, *flags, **environment):
    """Return what a service says that cannot start: one line, no traceback, nothing left behind."""
    with EyrieProcess(model, *FLAGS, *flags, environment=environment) as eyrie:
        assert eyrie.wait(100) == 1
        assert "Traceback" not in "\n".join(eyrie.stderr)
        (told,) = [line for line in eyrie.stderr if line.startswith("eyrie: ")]
        assert eyrie.leftovers() == []
    return told


@pytest.mark.timeout(120)
def test_a_host_cache_larger_than_the_memory_ends_the_start(model):
    told = told_at_the_start(model, "--host-cache-gb", "10000")
    assert "the host cache needs 10000.000 GiB" in told and "lower --host-cache-gb" in told


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_second_service_of_one_secret_on_a_node_is_told_who_has_its_arena(model, tmp_path):
    secret_file = tmp_path / "secret"
    secret_file.write_text(SECRET.hex())
    secret_file.chmod(0o600)
    with serving(Path("/dev/shm")) as first:
        client = new_client(first.core.endpoint)  # it makes the arena
        told = told_at_the_start(model, "--secret-file", str(secret_file))
        client.close()
    assert f".arena is owned by the live process {os.getpid()}" in told


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_transfer_without_mooncake_is_told_with_what_to_install(model, tmp_path):
    (tmp_path / "mooncake.py").write_text("raise ImportError('it is not installed')")
    told = told_at_the_start(model, "--transfer", "tcp", PYTHONPATH=str(tmp_path))
    assert "Mooncake cannot be loaded: it is not installed" in told and "install eyrie[mooncake]" in told
