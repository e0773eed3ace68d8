"""Pages of one node are fetched by the other over a real link; cut, it costs a recompute and nothing else."""

import re
import secrets
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from tests.e2e.eyrie_process import free_port
from tests.faults.two_nodes import TwoNodes, end_family, missing

MODEL = "smollm2-135m"
PAGE_SIZE = 16
PREFIX_LEN = 1024
NOISE_LEN = 3000
NUM_PAGES = PREFIX_LEN // PAGE_SIZE
BUNDLE_BYTES = 30 * 2 * 3 * 64 * 2 * PAGE_SIZE  # layers, K and V, heads, dimensions, bf16, tokens
"""Without a draft's part."""
PLACEMENTS = re.compile(r'eyrie_router_placements_total{[^}]*replica="([^"]+)"[^}]*} ([0-9.]+)')
ORIGINS = re.compile(r'eyrie_prefix_tokens_total{[^}]*origin="([^"]+)"[^}]*} ([0-9.]+)')
FAILED_PAGES = re.compile(r'eyrie_fetch_failed_pages_total{[^}]*source="peer"[^}]*} ([0-9.]+)')
HOST_PAGES = re.compile(r'eyrie_router_host_pages{cache_node="([^"]+)"[^}]*} ([0-9.]+)')
READ = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode())"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Service:
    """`eyrie serve` in node a's namespace, a replica on each node. Sides are `a` and `b`."""

    def __init__(self, nodes, folder, flags):
        self.nodes = nodes
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        self.log = folder / "serve.log"
        self._process = subprocess.Popen(
            nodes.inside(
                "a", sys.executable, "-m", "cluster", "serve", MODEL,
                "--ray-address", nodes.head, "--secret-file", secret,
                "--host", nodes.front, "--port", free_port(), "--num-replicas", 2,
                "--kv-gb", 0.2, "--host-cache-gb", 0.3, "--transfer", "tcp", *flags,
            ),
            env=nodes.environment,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.client = httpx.Client(base_url=self._ready(), timeout=90)
            self._sides = self._replicas()
        except BaseException:
            self.close()
            raise

    def close(self):
        end_family(self._process)
        self._process.stdout.close()

    def turn(self, token_ids, **options):
        """Return (side, cached tokens, text) of one completion."""
        before = self.placements()
        answer = self.client.post("/v1/completions", json=body(token_ids, 8) | options)
        assert answer.status_code == 200, answer.text
        cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return self.side_since(before), cached, answer.json()["choices"][0]["text"]

    def compute(self, side, seed):
        """Have a node compute a prompt; return its text once the router knows its pages there."""
        before = self._host_pages(side)
        with HeldUp(self, "ab".replace(side, ""), seed):
            found, cached, text = self.turn(prompt(seed))
        assert (found, cached) == (side, 0)
        self.until(lambda: self._host_pages(side) >= before + NUM_PAGES)
        return text

    def text_without_cache(self, token_ids):
        """Return what is answered by who computes all of a prompt, whatever pages there are."""
        _, cached, text = self.turn(token_ids, cache_salt=secrets.token_hex(8))
        assert cached == 0
        return text

    def failed_pages(self, side):
        """Return how many pages a replica's FETCHes from peers did not bring."""
        return sum(map(float, FAILED_PAGES.findall(self._worker_metrics(side))))

    def origins(self, side):
        """Return a replica's prompt tokens by where their KV came from."""
        return {origin: float(count) for origin, count in ORIGINS.findall(self._worker_metrics(side))}

    def placements(self):
        return {name: float(count) for name, count in PLACEMENTS.findall(self.client.get("/metrics").text)}

    def side_since(self, before):
        """Return where the one request went that was placed since then."""
        after = self.placements()
        (replica,) = [name for name in after if after[name] > before.get(name, 0)]
        return self._sides[replica]

    def until(self, is_so, timeout_s=30):
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def _ready(self):
        for line in self._process.stdout:
            if line.startswith("ready "):
                return line.split()[1]
        raise AssertionError(self.log.read_text()[-3000:])

    def _replicas(self):
        sides = {address: side for side, address in self.nodes.addresses.items()}
        return {labels["replica"]: sides[labels["node"]] for _, labels in self._workers()}

    def _workers(self):
        targets = self.client.get("/metrics/targets").json()
        pairs = [(target["targets"][0], target["labels"]) for target in targets]
        return [(address, labels) for address, labels in pairs if labels.get("process") == "worker"]

    def _worker_metrics(self, side):
        (address,) = [
            address for address, labels in self._workers() if labels["node"] == self.nodes.addresses[side]
        ]
        return self.nodes.run("a", sys.executable, "-c", READ, f"http://{address}/metrics")

    def _host_pages(self, side):
        found = dict(HOST_PAGES.findall(self.client.get("/metrics").text))
        return float(found.get(self.nodes.addresses[side], 0))


class HeldUp:
    """While open, one side has a long prompt to compute: the router finds the other one cheaper."""

    def __init__(self, service, side, seed, prefix=()):
        self._service, self._side, self._seed, self._prefix = service, side, seed, prefix
        self._streams = []

    def __enter__(self):
        for number in range(3):
            before = self._service.placements()
            noise = [*self._prefix, *prompt(100 * self._seed + number, NOISE_LEN)]
            self._streams.append(Stream(self._service.client, noise))
            self._service.until(lambda before=before: self._service.placements() != before)
            if self._service.side_since(before) == self._side:
                return self
        raise AssertionError(f"no request went to node {self._side}")

    def __exit__(self, *_):
        for stream in self._streams:
            stream.stop()


class Stream:
    """A request whose answer nobody waits for."""

    def __init__(self, client, token_ids):
        self._client, self._request = client, body(token_ids, 4) | {"stream": True}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def stop(self):
        self._thread.join(90)
        assert not self._thread.is_alive()

    def _read(self):
        try:
            with self._client.stream("POST", "/v1/completions", json=self._request) as answer:
                for _ in answer.iter_lines():
                    pass
        except httpx.HTTPError:
            pass  # its replica was cut off


def prompt(seed, length=PREFIX_LEN):
    return [1000 + (seed * 1009 + place * (17 + seed)) % 30_000 for place in range(length)]


def body(token_ids, max_tokens):
    options = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return {"model": MODEL, "prompt": token_ids, **options}


def test_what_a_process_left_that_ended_by_itself_ends_with_the_nodes():
    """As `ray start --block` does that fails: its GCS has another parent by then."""
    with TwoNodes(has_ray=False) as bare:
        parent = bare.inside("b", "sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!")
        started = subprocess.run(parent, check=True, capture_output=True, text=True, timeout=30)
        orphan = psutil.Process(int(started.stdout))
        assert orphan.is_running()
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def nodes():
    if (lacking := missing()) is not None:
        pytest.skip(lacking)
    with TwoNodes() as nodes:
        yield nodes


@pytest.fixture(
    scope="module",
    params=[[], ["--draft", "smollm2-135m-eagle3", "--draft-tokens", "3"]],
    ids=["plain", "draft"],
)
def service(request, nodes, tmp_path_factory):
    """A service without a draft, and one whose pages hold a draft's part as well."""
    service = Service(nodes, tmp_path_factory.mktemp("service"), request.param)
    yield service
    service.close()


def test_a_prefix_computed_on_one_node_is_fetched_by_the_other(nodes, service):
    text = service.compute("b", 1)
    arenas = [nodes.arena(side) for side in "ab"]
    assert arenas[0].stat().st_ino != arenas[1].stat().st_ino
    num_bytes = nodes.received_bytes("a")
    with HeldUp(service, "b", 1, prompt(1)):
        side, cached, found = service.turn([*prompt(1), 5, 6, 7])
    assert (side, cached) == ("a", PREFIX_LEN)
    assert service.origins("a")["peer"] == PREFIX_LEN
    assert nodes.received_bytes("a") - num_bytes >= NUM_PAGES * BUNDLE_BYTES
    assert service.text_without_cache(prompt(1)) == text
    assert service.text_without_cache([*prompt(1), 5, 6, 7]) == found


def test_a_cut_in_mid_fetch_costs_a_recompute_and_fetches_resume(nodes, service):
    text = service.compute("b", 2)
    failed = service.failed_pages("a")
    nodes.slow_down(20)
    num_bytes = nodes.received_bytes("a")
    answers = []
    with HeldUp(service, "b", 2, prompt(2)):
        asking = threading.Thread(target=lambda: answers.append(service.turn(prompt(2))))
        asking.start()
        service.until(lambda: nodes.received_bytes("a") - num_bytes > 4 * BUNDLE_BYTES)
        nodes.cut()
        asking.join(60)
        nodes.slow_down(None)
        nodes.mend()
    assert not asking.is_alive()
    ((side, cached, found),) = answers
    assert (side, found) == ("a", text)
    assert cached < PREFIX_LEN, "the rest of it was computed"
    service.until(lambda: service.failed_pages("a") > failed)
    assert service.text_without_cache(prompt(2)) == text

    peer = service.origins("a").get("peer", 0)
    for seed in range(3, 9):  # the first may find the breaker open still
        service.compute("b", seed)
        with HeldUp(service, "b", seed, prompt(seed)):
            side, cached, _ = service.turn([*prompt(seed), 5])
        if cached == PREFIX_LEN:
            break
    assert (side, cached) == ("a", PREFIX_LEN)
    assert service.origins("a")["peer"] >= peer + PREFIX_LEN
