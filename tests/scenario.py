"""Scenarios: greedy answers have to be the oracle's under every way of serving them.

A combination of FACTORS becomes options, a pool size, arrivals, urgent intruders, neighbours to abort.
`play` serves the cases that way, compares them token by token and proves that all it asks for took place.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Self

from tests.drafts import draft_options, is_perfect
from tests.followers import Followers
from tests.harness import Harness
from workers.config import WorkerConfig

FACTORS: dict[str, list[Any]] = {
    "composition": ["alone", "together", "staggered"],
    "chunk_len": [5, 24, 256],
    "page_size": [1, 16, 64],
    "is_hitting": [False, True],
    "is_evicting": [False, True],
    "is_preempting": [False, True],
    "is_aborting": [False, True],
    "tp_size": [1, 2],
    "graphs": [False, True],
    "overlap_depth": [0, 1],
    "attention_backend": ["reference", "auto"],  # auto: compiled kernels, where there is a compiler
}
MAX_TIE_MARGIN = 1e-3
URGENT_LEN, URGENT_TOKENS = 6, 6
NEIGHBOUR_TOKENS = 12
NEIGHBOUR_MAX_LEN = 40 + NEIGHBOUR_TOKENS
NOISE_TOKENS = 1024
NUM_AGAIN = 8
TURNS = ("first", "warm", "again")


@dataclass(frozen=True)
class Case:
    """A prompt, its greedy answer, and how far the oracle's best logit lay above the second at each token."""

    prompt_ids: list[int]
    token_ids: list[int]
    margins: list[float]

    def cut(self, num_tokens: int) -> Self:
        """Return the case with the first tokens of its answer only."""
        return replace(self, token_ids=self.token_ids[:num_tokens], margins=self.margins[:num_tokens])

    def half_answered(self) -> Self:
        """Return the case as a prompt that ends within the answer: its whole pages may be in the cache."""
        half = len(self.token_ids) // 2 + 1
        prompt_ids = self.prompt_ids + self.token_ids[:half]
        return replace(
            self, prompt_ids=prompt_ids, token_ids=self.token_ids[half:], margins=self.margins[half:]
        )


@dataclass
class Comparison:
    """Tokens compared so far and the differences that are ties."""

    num_tokens: int = 0
    ties: list[str] = field(default_factory=list)

    def compare(self, name: str, found: list[int], expected: list[int], margins: list[float]) -> None:
        """Fail on a difference that is no tie. What follows a tie is another text and is not compared."""
        assert len(found) == len(expected), f"{name}: {len(found)} tokens, expected {len(expected)}"
        for index, (token_id, wanted) in enumerate(zip(found, expected, strict=True)):
            self.num_tokens += 1
            if token_id == wanted:
                continue
            assert margins[index] < MAX_TIE_MARGIN, (
                f"{name}: token {index} is {token_id}, expected {wanted} by a margin of {margins[index]}; "
                f"found {found}, expected {expected}"
            )
            self.ties.append(f"tie: {name}: token {index}: {token_id}/{wanted}, margin {margins[index]}")
            return

    def finish(self) -> None:
        """Tell the ties; fail if they are more than 1 per 1,000 tokens."""
        for tie in self.ties:
            warnings.warn(tie, stacklevel=2)  # in the summary of every run; prints of many processes are lost
        assert len(self.ties) <= max(1, self.num_tokens / 1000), (
            f"{len(self.ties)} ties: {self.num_tokens} tokens"
        )


class Scenario:
    """One combination over one list of cases."""

    def __init__(self, combination: dict[str, Any], cases: Sequence[Case], max_running: int) -> None:
        self.combination = combination
        self.cases = cases
        self.draft: str | None = combination.get("draft")
        self.draft_options = draft_options(self.draft, combination["chunk_len"])
        self.name = " ".join(f"{name}={value}" for name, value in combination.items())
        # Of more, a short step's tokens would run out before its slots, and nobody had to give way.
        max_running = min(max_running, max(2, combination["chunk_len"] // 2))
        self.max_running = 1 if combination["composition"] == "alone" else max_running
        self._random = Random(self.name)
        self._num_neighbours = 0
        self._num_intrusions = 0
        self._to_abort: dict[str, int] = {}

    def config(self, **options: Any) -> WorkerConfig:
        combination = self.combination
        return WorkerConfig(
            dtype="float32",
            page_size=combination["page_size"],
            num_pages=self._num_pages(),
            max_tokens_per_step=combination["chunk_len"],
            max_running_requests=self.max_running,
            max_waiting_requests=10_000,
            tp_size=combination["tp_size"],
            graphs=combination["graphs"],
            graph_token_sizes=self._token_sizes(),
            attention_backend=combination["attention_backend"],
            overlap_depth=combination["overlap_depth"],
            kv_sanitizer=True,
            **self.draft_options,
            **options,
        )

    def play(self, comparison: Comparison, followers: Followers | None, **options: Any) -> None:
        """Serve all cases, then, where prefixes are to be hit, what they become when half answered."""
        with Harness(self.config(**options), followers=followers) as harness:
            if self.combination["is_evicting"]:
                self._fill(harness)
            self._serve(harness, "first", self.cases, comparison)
            if self.combination["is_hitting"]:
                # In a small pool only the last are still there; the longest has a whole page at least.
                longest = max(self.cases, key=lambda case: len(case.prompt_ids))
                self._serve(harness, "warm", [longest], comparison)
                again = [case.half_answered() for case in [longest, *self.cases[:NUM_AGAIN]]]
                self._serve(harness, "again", again, comparison)
            self._calm_down(harness, comparison)
            pages = harness.idle_pages()
            assert pages["owned"] == pages["cached"], f"{self.name}: pages leaked: {pages}"
            self._prove(harness)

    def _fill(self, harness: Harness) -> None:
        """Leave the pool full of cached pages: whoever comes next has to evict some."""
        self._submit_noise(harness, "filler", harness.scheduler.max_context_len - 1, 1)
        harness.run()

    def _serve(self, harness: Harness, turn: str, cases: Sequence[Case], comparison: Comparison) -> None:
        arrivals = [(f"{turn}-{index}", case) for index, case in enumerate(cases)]
        expected = dict(arrivals)
        if self.combination["is_aborting"]:
            self._add_neighbour(harness)  # ahead of all: aborted while it runs
        num_steps, next_intrusion = 0, 2
        while arrivals or any(harness.answers[name].finish_reason is None for name in expected):
            while arrivals and self._has_arrived(num_steps):
                name, case = arrivals.pop(0)
                harness.submit(
                    name,
                    case.prompt_ids,
                    max_tokens=len(case.token_ids),
                    ignore_eos=True,
                    tenant_salt=b"" if self.combination["is_hitting"] else name.encode(),
                )
                if self.combination["composition"] == "staggered":
                    break
            if self.combination["is_preempting"] and num_steps >= next_intrusion:
                next_intrusion = num_steps + self._intrude(harness)
            if self.combination["is_aborting"]:
                self._disturb(harness, num_steps)
            harness.step()
            num_steps += 1
            assert num_steps < 20_000, f"{self.name}: no end: {harness.unfinished()}"
        for name in self._to_abort:
            harness.abort(name)
        self._to_abort.clear()
        harness.run()
        for name, case in expected.items():
            answer = harness.answers[name]
            assert answer.finish_reason == "length"
            comparison.compare(f"{self.name} {name}", answer.token_ids, case.token_ids, case.margins)

    def _calm_down(self, harness: Harness, comparison: Comparison) -> None:
        """Serve one case with nothing beside it: its steps are decode steps, the graphs' own."""
        case = min(self.cases, key=lambda case: len(case.prompt_ids))
        harness.submit(
            "calm",
            case.prompt_ids,
            max_tokens=len(case.token_ids),
            ignore_eos=True,
            tenant_salt=b"" if self.combination["is_hitting"] else b"calm",
        )
        harness.run()
        comparison.compare(
            f"{self.name} calm", harness.answers["calm"].token_ids, case.token_ids, case.margins
        )

    def _has_arrived(self, num_steps: int) -> bool:
        return self.combination["composition"] != "staggered" or num_steps % 3 == 0

    def _intrude(self, harness: Harness) -> int:
        """Submit urgent requests that somebody must give way to: as many as slots, or one for all pages.

        Return after how many steps to try again; after three times they would only starve the others. A case
        has to run: neighbours and earlier intruders may be gone when the next step is planned.
        """
        running = [request.request_id for request in harness.scheduler._running.requests]
        if self._num_intrusions == 3 or not any(name.startswith(TURNS) for name in running):
            return 1
        is_evicting = self.combination["is_evicting"]
        prompt_len = harness.scheduler.max_context_len - URGENT_TOKENS if is_evicting else URGENT_LEN
        for number in range(1 if is_evicting else self.max_running):
            self._submit_noise(
                harness, f"urgent-{self._num_intrusions}-{number}", prompt_len, URGENT_TOKENS, priority=-1
            )
        self._num_intrusions += 1
        return 11

    def _add_neighbour(self, harness: Harness) -> None:
        self._num_neighbours += 1
        name = f"neighbour-{self._num_neighbours}"
        self._submit_noise(
            harness,
            name,
            self._random.randrange(2, NEIGHBOUR_MAX_LEN - NEIGHBOUR_TOKENS),
            NEIGHBOUR_TOKENS,
            temperature=1.0,
            seed=self._num_neighbours,
        )
        self._to_abort[name] = self._random.randrange(1, 9)

    def _submit_noise(
        self, harness: Harness, name: str, prompt_len: int, max_tokens: int, **options: Any
    ) -> None:
        """Submit a request whose answer nobody compares and whose pages nobody shares."""
        prompt = [self._random.randrange(3, 200) for _ in range(prompt_len)]
        harness.submit(
            name,
            prompt,
            max_tokens=max_tokens,
            ignore_eos=True,
            tenant_salt=name.encode(),
            **options,
        )

    def _disturb(self, harness: Harness, num_steps: int) -> None:
        """Add a sampling neighbour now and then; abort each after a few steps, wherever it stands."""
        if num_steps % 5 == 1:
            self._add_neighbour(harness)
        for name, steps_left in list(self._to_abort.items()):
            if steps_left:
                self._to_abort[name] -= 1
            else:
                del self._to_abort[name]
                harness.abort(name)

    def _token_sizes(self) -> tuple[int, ...] | None:
        """Return buckets for every step that prefills, where chunks are of middling length."""
        chunk_len = self.combination["chunk_len"]
        return (chunk_len // 3, chunk_len) if self.combination["graphs"] and chunk_len == 24 else None

    def _num_pages(self) -> int:
        """Return pages for all; when evicting, for what runs at once and a neighbour."""
        page_size = self.combination["page_size"]
        sizes = sorted(-(-(len(case.prompt_ids) + len(case.token_ids)) // page_size) for case in self.cases)
        if not self.combination["is_evicting"]:
            return 3 * sum(sizes) + NOISE_TOKENS // page_size
        window = WorkerConfig(**self.draft_options).draft_window
        spare = self.max_running * (1 + window // page_size)
        return sum(sizes[-self.max_running :]) + spare + NEIGHBOUR_MAX_LEN // page_size

    def _prove(self, harness: Harness) -> None:
        """Hold what took place against what the combination asks for."""
        wanted, stats, steps = self.combination, harness.scheduler.stats, harness.engine.graph_steps
        num_replays = sum(count for (_, outcome), count in steps.items() if outcome == "replay")
        num_evictions = harness.cache.stats().num_evictions
        num_aborted = stats.num_finished["abort"]
        num_cached = sum(answer.num_cached_tokens for answer in harness.answers.values())
        assert harness.engine.num_sanitized_steps > 0
        assert (num_replays > 0) == wanted["graphs"], f"{self.name}: steps ran as {steps}"
        if self._token_sizes() is not None:
            eager = {reason for (_, reason), count in harness.engine.eager_steps.items() if count}
            # Prompts beside rows that verify have no bucket.
            assert eager <= ({"unsupported"} if self.draft else set()), f"{self.name}: {eager}"
        assert (num_evictions > 0) == wanted["is_evicting"], f"{self.name}: {num_evictions} evictions"
        assert (num_aborted > 0) == wanted["is_aborting"], f"{self.name}: {num_aborted} aborted"
        assert (num_cached > 0) == wanted["is_hitting"], f"{self.name}: {num_cached} cached tokens"
        outcomes = {outcome for (_, outcome), count in stats.num_drafts.items() if count}
        assert is_perfect(self.draft) or self.draft is None or "rejected" in outcomes, (
            f"{self.name}: {outcomes}"
        )
        assert not is_perfect(self.draft) or "accepted" in outcomes, f"{self.name}: {outcomes}"
        assert not wanted["is_preempting"] or stats.num_preemptions > 0, f"{self.name}: none preempted"
