"""Greedy decode at several batch sizes: time to first token, time per token, and the floor of the card."""

import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu_rank import BenchRank, Launched, StepRecord, prompt
from tests.bench.measuring import compiled_kernels, say
from workers.plan import BatchPlan
from workers.protocol import Received, RequestId, RequestOutput, SamplingParams, SubmitRequest

PROMPT_LEN = 128
PROFILED_TOKENS = 64
NUM_KERNELS = 25
_ALL_REDUCE = re.compile("all_?reduce|^_sum_kernel", re.IGNORECASE)
"""Names of kernels that sum over ranks; waiting for the others counts."""
MAX_STEP_TOKENS = 8_192
"""Four steps compute all prompts of the largest batch."""


class DecodeRound(NamedTuple):
    """What came of one batch."""

    ttft_s: float
    """Mean"""
    tpot_s: float
    """Mean, with all decoding"""
    longest_s: float
    """Of the times between two tokens"""
    replayed_ratio: float
    """Of the decode steps"""


class Batch:
    """Clients that ask all at once; notes when each token came."""

    def __init__(self, name: str, prompts: list[list[int]], num_tokens: int) -> None:
        self._waiting = {RequestId(f"{name}/{number}"): tokens for number, tokens in enumerate(prompts)}
        self._sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._num_left = len(prompts)
        self.asked_s = 0.0
        self.times_s: dict[RequestId, list[float]] = {name: [] for name in self._waiting}
        self.ends_s: list[float] = []
        """When the steps ended that brought every client a token."""

    @property
    def are_done(self) -> bool:
        return not self._num_left

    def ask(self, now_s: float) -> list[Received]:
        self.asked_s = now_s if self._waiting else self.asked_s
        asked = [SubmitRequest(name, tokens, self._sampling) for name, tokens in self._waiting.items()]
        self._waiting = {}
        return list(asked)

    def wait_s(self, now_s: float) -> float:
        return 0.0

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        num_new = 0
        for output in outputs:
            if output.token_ids:
                assert len(output.token_ids) == 1, "speculation is off"
                num_new += 1
                self.times_s[output.request_id].append(now_s)
            self._num_left -= output.finish_reason is not None
        if num_new == len(self.times_s):
            self.ends_s.append(now_s)


def measure_decode(
    shape: str,
    options: dict[str, Any],
    read_gb_s: float,
    *,
    num_rounds: int,
    batch_sizes: tuple[int, ...],
    num_tokens: int = 128,
    is_profiled: bool = False,
    told: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Return figures by `b1`, `b8`, ...: medians over rounds, and the range of the rounds' TPOT.

    Where `is_profiled`, also what the device did in a round more, which counts for nothing else. `told` is
    given what there is after each batch.
    """
    page_size = options.get("page_size", 16)
    pages_per_request = -(-(PROMPT_LEN + num_tokens) // page_size) + 1
    defaults = {
        "num_pages": max(batch_sizes) * pages_per_request,
        "max_running_requests": max(batch_sizes),
        "max_tokens_per_step": MAX_STEP_TOKENS,
        "prefix_caching": False,
    }
    results: dict[str, Any] = {}
    with BenchRank(shape, defaults | options) as rank:
        results["start_s"] = round(rank.start_s, 1)
        for batch_size in batch_sizes:
            _one_round(rank, f"{batch_size}/-1", batch_size, 8)  # warms up
            before = compiled_kernels()
            rounds = [
                _one_round(rank, f"{batch_size}/{round_}", batch_size, num_tokens)
                for round_ in range(num_rounds)
            ]
            tpots = [one.tpot_s for one in rounds]
            tpot_s = statistics.median(tpots)
            mean_len = PROMPT_LEN + num_tokens / 2
            read_bytes = rank.weight_bytes_read + batch_size * mean_len * rank.token_bytes
            floor_s = read_bytes / (rank.config.tp_size * read_gb_s * 1e9)
            results[f"b{batch_size}"] = found = {
                "ttft_ms": round(1000 * statistics.median(one.ttft_s for one in rounds), 3),
                "tpot_ms": round(1000 * tpot_s, 4),
                "tpot_range_ms": [round(1000 * min(tpots), 4), round(1000 * max(tpots), 4)],
                "decode_tok_s": round(batch_size / tpot_s, 1),
                "floor_ms": round(1000 * floor_s, 4),
                "tpot_over_floor": round(tpot_s / floor_s, 3),
                "longest_ms": [round(1000 * one.longest_s, 2) for one in rounds],
                "replayed_ratio": round(min(one.replayed_ratio for one in rounds), 4),
                "compiled": dict(compiled_kernels() - before),
            }
            say(f"{shape} batch {batch_size}: {found}")
            told(results)
        results["weight_gb_read"] = round(rank.weight_bytes_read / 1e9, 3)
        for batch_size in batch_sizes if is_profiled else ():
            results[f"b{batch_size}"]["profile"] = _profile(rank, batch_size)
            told(results)
    return results


def _profile(rank: BenchRank, batch_size: int) -> dict[str, Any]:
    """Return the share of its time that the device worked in decode steps of the whole batch, that of it in
    which it summed over ranks, and the kernels that took most of it."""
    is_cuda = rank.config.device == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU])
    times_s: list[float] = []

    def launched(plan: BatchPlan, record: StepRecord | None) -> None:
        if plan.mode == "decode" and len(plan.slots) == batch_size:
            if not times_s:
                profiler.start()
            times_s.append(time.perf_counter())

    _one_round(rank, f"{batch_size}/profile", batch_size, PROFILED_TOKENS, launched)
    profiler.stop()
    wall_us = 1e6 * (times_s[-1] - times_s[0])
    num_steps = len(times_s) - 1
    times = {
        event.key: (event.self_device_time_total if is_cuda else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    total_us = sum(us for us, _ in times.values())
    reduce_us = sum(us for name, (us, _) in times.items() if _ALL_REDUCE.search(name))
    most = sorted(times.items(), key=lambda item: -item[1][0])[:NUM_KERNELS]
    return {
        "busy_ratio": round(total_us / wall_us, 3),
        "all_reduce_share": round(reduce_us / total_us, 4),
        "kernels": [
            {"name": name[:120], "calls": calls, "us_per_token": round(us / num_steps, 2)}
            for name, (us, calls) in most
        ],
    }


def _one_round(
    rank: BenchRank, name: str, batch_size: int, num_tokens: int, launched: Launched | None = None
) -> DecodeRound:
    """Ask for a whole batch at once."""
    random = Random(name)
    prompts = [prompt(random, PROMPT_LEN, rank.model.vocab_size) for _ in range(batch_size)]
    batch = Batch(name, prompts, num_tokens)
    steps = rank.run(batch, launched=launched)
    assert all(len(times_s) == num_tokens for times_s in batch.times_s.values()), "tokens are missing"
    ttft_s = statistics.fmean(times_s[0] - batch.asked_s for times_s in batch.times_s.values())
    decodes = [step for step in steps if step.mode == "decode"]
    replayed = sum(step.outcome != "eager" for step in decodes) / len(decodes)
    # The first step that serves all may be a mixed one: what follows it are decodes of the whole batch.
    tpot_s = (batch.ends_s[-1] - batch.ends_s[0]) / (len(batch.ends_s) - 1)
    longest_s = max(later - earlier for earlier, later in pairwise(batch.ends_s))
    return DecodeRound(ttft_s, tpot_s, longest_s, replayed)
