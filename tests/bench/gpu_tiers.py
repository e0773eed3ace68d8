"""The multi-turn workload with the host tier off or on: the node's CacheServer in a process of its own."""

import dataclasses
from contextlib import ExitStack
from typing import Any

from cache_service.messages import Clear
from tests.bench.cache_node import CacheNode
from tests.bench.gpu_multiturn import FULL, SMALL, Workload, measure_multiturn
from tests.bench.gpu_rank import BenchRank
from tests.bench.measuring import say

MAX_STEP_TOKENS = 768
ARENA_ROOM = 1.03
"""Beside its pages an arena has headers, and a part that is kept free."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A step's tokens at most, and what one may take while answers run; None: any time."""

    max_tokens: int
    target_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `TOKENS` or `TOKENS:MILLISECONDS`."""
        tokens, _, target_ms = text.partition(":")
        return cls(int(tokens), float(target_ms) if target_ms else None)

    def __str__(self) -> str:
        return str(self.max_tokens) if self.target_ms is None else f"{self.max_tokens}:{self.target_ms:g}"


def measure_arm(
    arm: str, shape: str, options: dict[str, Any], budgets: list[Budget], *, is_quick: bool
) -> dict[str, dict[str, Any]]:
    """Return the figures of one arm, after a short warm-up: by budget where there are several.

    These take turns on one rank; between them the arena is emptied.
    """
    workload, has_tier = SMALL if is_quick else FULL, arm == "tier_on"
    page_size = options.get("page_size", 16)
    defaults = {
        "num_pages": workload.device_tokens // page_size,
        "max_running_requests": workload.max_in_flight + workload.num_steady,
        "max_waiting_requests": workload.num_chats,
        "max_tokens_per_step": max((budget.max_tokens for budget in budgets), default=MAX_STEP_TOKENS),
    }
    results: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {"shape": shape}
    with ExitStack() as stack:
        rank = stack.enter_context(BenchRank(shape, defaults | options))
        found["start_s"] = round(rank.start_s, 1)
        if has_tier:
            arena_gb = ARENA_ROOM * workload.host_tokens * rank.token_bytes / (1 << 30)
            node = stack.enter_context(CacheNode(arena_gb))
            stack.callback(rank.attach(node).close)
            found["arena_gb"] = round(arena_gb, 2)
        say(f"{shape}: started in {rank.start_s:.1f} s")
        measure_multiturn(rank, warm_up_of(workload), "warm")
        for budget in budgets or [None]:
            if budget is not None:
                rank.limit_steps(budget.max_tokens, budget.target_ms)
            name = arm if budget is None or len(budgets) == 1 else f"{arm}@{budget}"
            results[name] = found | {"budget": str(budget)} | measure_multiturn(rank, workload, name)
            say(f"{name}: {results[name]}")
            rank.settle()
            if rank.host_pages is not None and (tier := rank.host_pages.figures.tier) is not None:
                results[name]["failed_loads"] = sum(tier.stats.failed_loads.values())
                results[name]["failed_saves"] = sum(tier.stats.failed_saves.values())
                node.ask(Clear())
    return results


def warm_up_of(workload: Workload) -> Workload:
    """Return a short workload of the same kinds of steps."""
    return dataclasses.replace(
        workload,
        num_chats=min(workload.num_chats, 4),
        num_turns=2,
        num_steady=1,
        steady_tokens=workload.steady_tokens // 10,
    )
