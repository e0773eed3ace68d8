"""A killed rank's replica is started again, and a chat goes on where the host cache has its pages."""

import json
import re
import shutil
import threading
import time

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

FLAGS = ["--load-format", "dummy", "--port", "0", "--kv-gb", "0.05", "--kv-sanitizer"]
HOST_CACHE = ["--host-cache-gb", "0.05"]
WAIT_S = 120.0
PAGE_SIZE = 16
MIDDLE = 8
"""Tokens of an answer after which its worker is killed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def until(condition):
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


class Chat:
    """A conversation that only grows when a turn was answered whole."""

    def __init__(self, url, model):
        self.url = url
        self.model = model
        self.messages = []
        self.num_told = 0
        """Tokens of the turns so far, the last answer not counted."""
        self.drafts = {}
        """What became of those of the last answer."""

    def body(self, text, **more):
        messages = [*self.messages, {"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "temperature": 0, "ignore_eos": True, **more}

    def say(self, text):
        """Return the answer and how many tokens of the prompt were cached."""
        body = self.body(text, max_tokens=40, usage_details=True)
        answer = (
            httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        )
        reply, usage = answer["choices"][0]["message"]["content"], answer["usage"]
        self.messages = [*body["messages"], {"role": "assistant", "content": reply}]
        self.num_told = usage["prompt_tokens"]
        self.drafts = usage.get("completion_tokens_details", {})
        return reply, usage["prompt_tokens_details"]["cached_tokens"]

    def say_and_be_cut_off(self, text, in_the_middle):
        """Return the text that came, and the error's code; `in_the_middle` is called while it comes."""
        said, code, called = [], None, threading.Event()
        body = self.body(text, max_tokens=600, stream=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    code = event["error"]["code"]
                    continue
                said.append(event["choices"][0]["delta"].get("content") or "")
                if len(said) == MIDDLE and not called.is_set():
                    called.set()
                    in_the_middle()
        return "".join(said[:MIDDLE]), code

    def is_ready(self):
        return httpx.get(f"{self.url}/ready").status_code == 200

    def is_restarting(self):
        answer = httpx.get(f"{self.url}/ready")
        return answer.status_code == 503 and "it is being restarted" in answer.json()["reason"]


def whole_pages(num_tokens):
    return num_tokens // PAGE_SIZE * PAGE_SIZE


def ranks(eyrie):
    return sorted(eyrie.members("ray::Worker"), key=lambda worker: worker.create_time())


def lives(process):
    return process.is_running() and process.status() != "zombie"


def check_refused_while_restarting(chat):
    until(chat.is_restarting)
    refused = httpx.post(f"{chat.url}/v1/chat/completions", json=chat.body("hello"), timeout=60)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 1, "a restart takes longer"
    assert refused.json()["error"]["code"] == "no_replica"


def metrics(chat):
    return httpx.get(f"{chat.url}/metrics").text


def check_metrics(chat, tp_size):
    for name in ("eyrie_replica_restarts_total", "eyrie_replica_losses_total"):
        assert re.search(rf'^{name}{{.*replica="replica-0"}} 1\.0$', metrics(chat), re.MULTILINE)
    targets = httpx.get(f"{chat.url}/metrics/targets").json()
    workers = [target for target in targets if target["labels"].get("process") == "worker"]
    assert len(workers) == tp_size
    for worker in workers:
        assert "eyrie_" in httpx.get(f"http://{worker['targets'][0]}/metrics").text


SELF = ["--draft", "self", "--draft-tokens", "3"]
"""A draft that is right always, if what its pages hold of it came back."""


def check_drafts(chat, draft):
    if draft == SELF:
        assert chat.drafts["rejected_prediction_tokens"] == 0 < chat.drafts["accepted_prediction_tokens"]


@pytest.mark.parametrize("draft", [[], SELF], ids=["plain", "draft"])
@pytest.mark.parametrize(
    ("tp_size", "has_host_cache"),
    [(1, True), (2, True), (1, False)],
    ids=["one-rank", "two-ranks", "no-cache"],
)
def test_the_next_turn_hits_the_host_tier_after_a_worker_was_killed(model, tp_size, has_host_cache, draft):
    flags = [*FLAGS, *draft, "--tp-size", str(tp_size), *(HOST_CACHE if has_host_cache else [])]
    with EyrieProcess(model, *flags) as eyrie:
        chat = Chat(eyrie.url(), model)
        chat.say("Tell me of the birds of prey. " * 12)
        told = chat.num_told
        group = ranks(eyrie)
        assert len(group) == tp_size
        said, code = chat.say_and_be_cut_off("And of the owls?", group[-1].kill)
        assert code == "replica_failed"
        check_refused_while_restarting(chat)
        until(chat.is_ready)
        assert not any(lives(rank) for rank in group), "the whole group was torn down"
        reply, cached = chat.say("And of the owls?")
        assert cached >= whole_pages(told) > 0 if has_host_cache else cached == 0
        assert reply.startswith(said), "a restored prefix goes on as the computed one did"
        check_drafts(chat, draft)
        check_metrics(chat, tp_size)
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


@pytest.mark.parametrize("draft", [[], SELF], ids=["plain", "draft"])
def test_the_next_turn_hits_it_also_after_the_cache_server_was_killed_before_the_worker(model, draft):
    with EyrieProcess(model, *FLAGS, *draft, *HOST_CACHE) as eyrie:
        chat = Chat(eyrie.url(), model)
        chat.say("Tell me of the birds of prey. " * 12)
        told = chat.num_told
        [server] = eyrie.members("ray::CacheServer")
        server.kill()
        said, code = chat.say_and_be_cut_off("And of the owls?", ranks(eyrie)[0].kill)
        assert code == "replica_failed"
        until(chat.is_restarting)
        until(chat.is_ready)
        reply, cached = chat.say("And of the owls?")
        assert cached >= whole_pages(told) > 0
        assert reply.startswith(said)
        check_drafts(chat, draft)
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


def test_the_other_replica_serves_meanwhile(model):
    with EyrieProcess(model, *FLAGS, "--num-replicas", "2") as eyrie:
        chat = Chat(eyrie.url(), model)
        ranks(eyrie)[0].kill()
        until(lambda: any("restarting a replica" in line for line in eyrie.stderr))
        while not any("a replica serves again" in line for line in eyrie.stderr):
            assert chat.is_ready()
            chat.messages = []
            chat.say("Tell me of the birds of prey.")
        until(lambda: re.search(r"^eyrie_ready_replicas{.*} 2\.0$", metrics(chat), re.MULTILINE))
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_stop_during_a_restart_leaves_nothing_behind(model, num_signals):
    with EyrieProcess(model, *FLAGS, *HOST_CACHE, "--tp-size", "2") as eyrie:
        url = eyrie.url()
        ranks(eyrie)[0].kill()
        until(lambda: any("restarting a replica" in line for line in eyrie.stderr))
        for _ in range(num_signals):
            eyrie.terminate()
            time.sleep(0.2)
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")


def test_a_replica_that_cannot_start_again_stays_down_and_ends_the_service(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "tiny")
    with EyrieProcess(str(copy), *FLAGS, "--max-restarts", "2") as eyrie:
        eyrie.url()
        (copy / "config.json").unlink()
        ranks(eyrie)[0].kill()
        assert eyrie.wait(WAIT_S) == 1
        assert eyrie.leftovers() == []
    [told] = [line for line in eyrie.stderr if line.startswith("eyrie: ")]
    assert "no replica is left (replica-0: its start failed: " in told and "config.json" in told
    assert sum("restarting a replica" in line for line in eyrie.stderr) == 2
