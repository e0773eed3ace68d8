"""Chats of several turns beside steady decodes: what a hierarchical cache gives, and what it costs others.

Each turn sends all that the chat has so far and some new tokens. A chat in its think time does not count as
in flight; turns that find too many in flight wait their turn, and their time begins when they are sent.
"""

import gc
import heapq
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.bench.gpu_rank import BenchRank, StepRecord, prompt
from tests.bench.measuring import quantile
from workers.protocol import Received, RequestId, RequestOutput, SamplingParams, SubmitRequest

LONG_GAP_S = 0.2


@dataclass(frozen=True)
class Workload:
    """How many chats and steady decodes, and how long they are."""

    num_chats: int = 64
    num_turns: int = 5
    new_len: int = 1_024
    num_tokens: int = 64
    max_in_flight: int = 32
    think_s: tuple[float, float] = (0.25, 0.75)
    num_steady: int = 8
    steady_len: int = 256
    steady_tokens: int = 1_500
    device_tokens: int = 120_000
    host_tokens: int = 360_000


FULL = Workload()
SMALL = Workload(
    num_chats=6,
    num_turns=3,
    new_len=96,
    num_tokens=8,
    max_in_flight=3,
    think_s=(0.01, 0.03),
    num_steady=2,
    steady_len=32,
    steady_tokens=120,
    device_tokens=1_600,
    host_tokens=8_000,
)
"""For rehearsals on a CPU."""


@dataclass
class Answer:
    """What one client saw of one request."""

    asked_s: float
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0


class Chats:
    """The clients of one run."""

    def __init__(self, workload: Workload, name: str, vocab_size: int) -> None:
        self.workload = workload
        self._name = name
        self._random = Random(name)
        self._vocab_size = vocab_size
        self._history: list[list[int]] = [[] for _ in range(workload.num_chats)]
        self._thinking: list[tuple[float, int, int]] = [(0.0, chat, 0) for chat in range(workload.num_chats)]
        self._ready: deque[tuple[int, int]] = deque()
        self._num_in_flight = 0
        self._num_left = workload.num_chats * workload.num_turns + workload.num_steady
        self.began_s: float | None = None
        self.chats_ended_s = self.ended_s = 0.0
        self.turns: dict[tuple[int, int], Answer] = {}
        self.steady: dict[int, Answer] = {}

    @property
    def are_done(self) -> bool:
        return not self._num_left

    def ask(self, now_s: float) -> list[Received]:
        asked: list[Received] = []
        if self.began_s is None:
            self.began_s = now_s
            for number in range(self.workload.num_steady):
                self.steady[number] = Answer(now_s)
                tokens = prompt(self._random, self.workload.steady_len, self._vocab_size)
                asked.append(self._request(f"steady-{number}", tokens, self.workload.steady_tokens))
        while self._thinking and self._thinking[0][0] <= now_s:
            self._ready.append(heapq.heappop(self._thinking)[1:])
        while self._ready and self._num_in_flight < self.workload.max_in_flight:
            chat, turn = self._ready.popleft()
            self._num_in_flight += 1
            self.turns[chat, turn] = Answer(now_s)
            self._history[chat] += prompt(self._random, self.workload.new_len, self._vocab_size)
            asked.append(
                self._request(f"chat-{chat}-{turn}", list(self._history[chat]), self.workload.num_tokens)
            )
        return asked

    def wait_s(self, now_s: float) -> float:
        if not self._thinking or self._num_in_flight >= self.workload.max_in_flight:
            return 0.0
        return max(self._thinking[0][0] - now_s, 1e-4)

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        for output in outputs:
            kind, *numbers = output.request_id.removeprefix(f"{self._name}/").split("-")
            place = tuple(map(int, numbers))
            answer = self.steady[place[0]] if kind == "steady" else self.turns[place]
            answer.times_s += [now_s] * len(output.token_ids)
            answer.token_ids += output.token_ids
            answer.num_cached = output.num_cached_tokens
            if output.finish_reason is not None:
                self._num_left -= 1
                self.ended_s = now_s
                if kind == "chat":
                    self._end_turn(*place, now_s)

    def _end_turn(self, chat: int, turn: int, now_s: float) -> None:
        self._num_in_flight -= 1
        self.chats_ended_s = now_s
        self._history[chat] += self.turns[chat, turn].token_ids
        if turn + 1 < self.workload.num_turns:
            due_s = now_s + self._random.uniform(*self.workload.think_s)
            heapq.heappush(self._thinking, (due_s, chat, turn + 1))

    def _request(self, name: str, tokens: list[int], num_tokens: int) -> SubmitRequest:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return SubmitRequest(RequestId(f"{self._name}/{name}"), tokens, sampling)


def measure_multiturn(rank: BenchRank, workload: Workload, name: str) -> dict[str, Any]:
    """Run the workload once and return its figures."""
    stats = None if rank.host_pages is None else rank.host_pages.mover.stats
    before = ({}, {}) if stats is None else (dict(stats.num_bytes), dict(stats.seconds))
    chats = Chats(workload, name, rank.model.vocab_size)
    with _CollectorPauses() as pauses:
        steps = rank.run(chats)
    assert chats.began_s is not None
    wall_s = chats.ended_s - chats.began_s
    found = {"wall_s": wall_s, "chat_wall_s": chats.chats_ended_s - chats.began_s}
    found |= {"gc_max_ms": 1000 * max(pauses.seconds), "gc_total_ms": 1000 * sum(pauses.seconds)}
    found |= chat_figures(chats) | steady_figures(chats) | _step_figures(steps)
    if stats is not None:
        for kind in ("load", "save"):
            moved = stats.num_bytes[kind] - before[0][kind]
            seconds = stats.seconds[kind] - before[1][kind]
            found[f"{kind}_gb"] = moved / 1e9
            found[f"{kind}_gb_s"] = moved / seconds / 1e9 if seconds else 0.0
            found[f"{kind}_bounced_pages"] = stats.num_bounced[kind]
        found["host_waits"] = stats.num_waits["host"]
    return {name: round(value, 4) for name, value in found.items()}


class _CollectorPauses:
    """How long Python's garbage collector held everything up."""

    def __init__(self) -> None:
        self.seconds = [0.0]
        self._began_s = 0.0

    def __enter__(self) -> "_CollectorPauses":
        gc.callbacks.append(self._told)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._told)

    def _told(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began_s = time.perf_counter()
        else:
            self.seconds.append(time.perf_counter() - self._began_s)


def chat_figures(chats: Chats) -> dict[str, float]:
    workload = chats.workload
    ttfts = {place: answer.times_s[0] - answer.asked_s for place, answer in chats.turns.items()}
    found = {
        "ttft_mean_ms": 1000 * statistics.fmean(ttfts.values()),
        "ttft_p99_ms": 1000 * quantile(ttfts.values(), 0.99),
    }
    for turn in range(workload.num_turns):
        of_turn = [ttft_s for (_, number), ttft_s in ttfts.items() if number == turn]
        found[f"ttft_turn{turn + 1}_ms"] = 1000 * statistics.fmean(of_turn)
    prompt_lens = [
        workload.new_len + turn * (workload.new_len + workload.num_tokens)
        for turn in range(workload.num_turns)
    ]
    num_cached = sum(answer.num_cached for answer in chats.turns.values())
    found["cached_share"] = num_cached / (workload.num_chats * sum(prompt_lens))
    tpots = [
        (answer.times_s[-1] - answer.times_s[0]) / (len(answer.times_s) - 1)
        for answer in chats.turns.values()
    ]
    found["chat_tpot_mean_ms"] = 1000 * statistics.fmean(tpots)
    return found


def steady_figures(chats: Chats) -> dict[str, float]:
    gaps = [
        later - earlier
        for answer in chats.steady.values()
        for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)
    ]
    return {
        "steady_mean_ms": 1000 * statistics.fmean(gaps),
        "steady_p50_ms": 1000 * statistics.median(gaps),
        "steady_p99_ms": 1000 * quantile(gaps, 0.99),
        "steady_max_ms": 1000 * max(gaps),
        "steady_gaps_over_200ms": sum(gap > LONG_GAP_S for gap in gaps),
    }


def _step_figures(steps: list[StepRecord]) -> dict[str, float]:
    """Return how steps ran; by mode, how many there were, how long and how many of them were replayed."""
    found: dict[str, float] = {}
    for mode in sorted({step.mode for step in steps}):
        of_mode = [step for step in steps if step.mode == mode]
        found[f"{mode}_steps"] = len(of_mode)
        found[f"{mode}_replayed"] = sum(step.outcome != "eager" for step in of_mode)
        found[f"{mode}_step_mean_ms"] = 1000 * statistics.fmean(step.duration_s for step in of_mode)
        found[f"{mode}_step_max_ms"] = 1000 * max(step.duration_s for step in of_mode)
        found[f"{mode}_tokens_mean"] = statistics.fmean(step.num_tokens for step in of_mode)
    decodes = [step for step in steps if step.mode == "decode"]
    found["graph_replay_ratio"] = sum(step.outcome != "eager" for step in decodes) / max(len(decodes), 1)
    num_replayed = sum(step.num_decodes for step in steps if step.outcome != "eager")
    found["replayed_decode_token_ratio"] = num_replayed / sum(step.num_decodes for step in steps)
    return found
