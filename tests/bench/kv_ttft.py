"""Time to the first token of a prompt whose first 2,048 tokens are in the cache, by where they are.

Ranks with their step loops and inboxes in processes of their own, as in service but for Ray and HTTP, on two
nodes: one computes prompts (the miss) and later takes some of them back from its arena, the other takes some
from the first one's arena and some from Mooncake Store. Only one rank works at a time.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path

from cache_service.messages import Stats
from tests.bench.cache_node import SECRET, TIMEOUT_S, CacheNode, eventually
from tests.bench.measuring import Medians, say
from tests.unit.mooncake_master import MooncakeMaster

MODEL = "smollm2-135m"
VOCAB_SIZE = 49_152
PREFIX_LEN, PAGE_SIZE = 2_048, 16
PROMPT_LEN = PREFIX_LEN + PAGE_SIZE
"""The rest is computed either way."""
NUM_DEVICE_PAGES = 160
"""More than one prompt, fewer than two: the next prompt drives the last one out."""
MAX_STEP_TOKENS = 512
"""As bench_cpu's."""
ARENA_GB = 2.0
ARMS = ("host", "peer", "store")


def measure_ttft(rounds):
    """Return ttft_hit_over_miss_*, the times behind them, and the miss arm's prefill beside bench_cpu's."""
    found = Medians()
    with tempfile.TemporaryDirectory() as folder, _Cluster(Path(folder)) as cluster:
        for round_ in range(-1, rounds):  # the first warms up
            for name, value in cluster.one_round().items():
                if round_ >= 0:
                    found.add(name, value)
                say(f"round {round_}: {name} {value:.4g}")
    results = {"ttft_miss_ms": round(1000 * found["miss"], 1)}
    for arm in ARMS:
        results[f"ttft_hit_over_miss_{arm}"] = round(found[arm] / found["miss"], 4)
        results[f"ttft_{arm}_ms"] = round(1000 * found[arm], 1)
    results["miss_prefill"] = round(PROMPT_LEN / found["miss"], 1)
    results["bench_cpu_prefill"] = round(found["bench_cpu"], 1)
    results["miss_prefill_ratio"] = round(PROMPT_LEN / found["miss"] / found["bench_cpu"], 3)
    return results


class _Cluster:
    """Two nodes with a rank each, a Mooncake master, and bench_cpu's arm beside them."""

    def __init__(self, folder):
        self._folder = folder
        self._prompts = _prompts()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            master = MooncakeMaster(self._folder / "master.log")
            stack.callback(master.kill)
            self._near, self._far = nodes = [
                stack.enter_context(
                    CacheNode(
                        ARENA_GB,
                        host,
                        transfer="tcp",
                        store=f"mooncake:{master.endpoint}?segment_gb={segment_gb}",
                    )
                )
                for host, segment_gb in (("127.0.0.1", 2), ("127.0.0.2", 0))
            ]
            roles = [(_run_rank, number, node.endpoint) for number, node in enumerate(nodes, start=1)]
            near, far, self._bench_cpu = (
                stack.enter_context(_Child(*role)) for role in (*roles, (_run_bench_cpu,))
            )
            self._near_rank, self._far_rank = (
                stack.enter_context(_Client(rank.answer())) for rank in (near, far)
            )
            self._bench_cpu.answer()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._resources.close()

    def one_round(self):
        """Run every arm once: three misses, then their three ways back."""
        prompts = list(itertools.islice(self._prompts, len(ARMS)))
        misses = []
        for prompt in prompts:
            seconds, num_cached = self._near_rank.ask(prompt)
            assert num_cached == 0
            misses.append(seconds)
            self._wait_until_put()
        found = {"miss": sorted(misses)[len(misses) // 2]}
        found["bench_cpu"] = self._bench_cpu.ask(next(self._prompts))
        for arm, prompt in zip(ARMS, prompts, strict=True):
            rank = self._near_rank if arm == "host" else self._far_rank
            peer = self._near.endpoint if arm == "peer" else None
            before = self._far.count("fetch_bytes")
            found[arm], num_cached = rank.ask(prompt, [] if arm == "host" else [peer])
            assert num_cached == PREFIX_LEN, f"{arm}: {num_cached} tokens were cached"
            after = self._far.count("fetch_bytes")
            grown = {kind for kind in after if after[kind] > before.get(kind, 0)}
            assert grown == ({arm} - {"host"}), f"{arm}: pages came from {grown}"
        return found

    def _wait_until_put(self):
        def is_put():
            stats = self._near.ask(Stats())
            return stats.num_known_remote >= stats.num_ready > 0 and not stats.num_put_waiting

        eventually(is_put)


def _prompts():
    """Yield prompts that have nothing in common."""
    for number in itertools.count():
        chance = random.Random(number)
        yield [chance.randrange(100, VOCAB_SIZE) for _ in range(PROMPT_LEN)]


class _Child:
    """A process that answers over a pipe: once when it is ready, then each question."""

    def __init__(self, role, *arguments):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=role, args=(theirs, *arguments), daemon=True)
        self._process.start()

    def answer(self):
        if not self._pipe.poll(5 * TIMEOUT_S):
            raise TimeoutError("a process of the benchmark does not answer")
        return self._pipe.recv()

    def ask(self, question):
        self._pipe.send(question)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(TIMEOUT_S)


def _run_rank(pipe, incarnation, cache_endpoint):
    """Tell the inbox's endpoint, then step until told to stop."""
    from workers.config import WorkerConfig
    from workers.protocol import ReplicaId
    from workers.rank import Rank, RankSpec

    config = WorkerConfig(model=MODEL, num_pages=NUM_DEVICE_PAGES, max_tokens_per_step=MAX_STEP_TOKENS)
    name, host, num_threads = ReplicaId(f"bench-{incarnation}"), "127.0.0.1", os.cpu_count() or 1
    rank = Rank(RankSpec(config, name, 0, incarnation, host, host, 0, num_threads, cache_endpoint), SECRET)
    pipe.send(rank.inbox.endpoint)
    threading.Thread(target=lambda: (pipe.recv(), rank.stop()), daemon=True).start()
    rank.run()


def _run_bench_cpu(pipe):
    """Answer each prompt with its prefill's tokens a second, as bench_cpu measures them."""
    import torch

    from tests.bench.bench_cpu import EyrieArm

    torch.set_num_threads(os.cpu_count() or 1)
    arm = EyrieArm(max_running=8)
    pipe.send(None)
    while (prompt := pipe.recv()) is not None:
        pipe.send(arm.run([prompt], 2)[0])


class _Client:
    """Speaks to a rank's inbox. Itself its Connection's listener."""

    def __init__(self, endpoint):
        from cluster.connection import Connection

        self._generation, self._num_asked = 0, 0
        self._opened, self._ended = threading.Event(), threading.Event()
        self._first = None
        self._connection = Connection(endpoint, SECRET, "bench", self, lease_s=TIMEOUT_S)
        self._connection.start()
        assert self._opened.wait(TIMEOUT_S), "the rank does not answer"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    def ask(self, prompt, peers=()):
        """Return the seconds to the first token and how many tokens were cached; None: the store."""
        from workers.protocol import FetchHint, RequestId, SamplingParams, SubmitRequest

        self._num_asked += 1
        self._first = None
        self._ended.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        hints = [FetchHint(peer, PREFIX_LEN // PAGE_SIZE) for peer in peers]
        request = SubmitRequest(RequestId(str(self._num_asked)), prompt, sampling, hints=hints)
        began_s = time.perf_counter()
        self._connection.send(self._generation, request)
        assert self._ended.wait(TIMEOUT_S) and self._first is not None
        return self._first[0] - began_s, self._first[1]

    def opened(self, generation, welcome):
        self._generation = generation
        self._opened.set()

    def stepped(self, outputs, load, kv_events):
        for output in outputs:
            if output.token_ids and self._first is None:
                self._first = time.perf_counter(), output.num_cached_tokens
            if output.finish_reason is not None:
                self._ended.set()
        return True

    def closed(self, why):
        self._ended.set()
