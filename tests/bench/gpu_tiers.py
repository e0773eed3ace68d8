"""The multi-turn workload with the host tier off or on: the node's CacheServer in a process of its own."""

import dataclasses
from contextlib import ExitStack
from typing import Any

from tests.bench.cache_node import CacheNode
from tests.bench.gpu_multiturn import FULL, SMALL, Workload, measure_multiturn
from tests.bench.gpu_rank import BenchRank
from tests.bench.measuring import say

MAX_STEP_TOKENS = 768
ARENA_ROOM = 1.03
"""Beside its pages an arena has headers, and a part that is kept free."""


def measure_arm(shape: str, options: dict[str, Any], has_tier: bool, *, is_quick: bool) -> dict[str, Any]:
    """Return the figures of one arm, after a short warm-up."""
    workload = SMALL if is_quick else FULL
    page_size = options.get("page_size", 16)
    defaults = {
        "num_pages": workload.device_tokens // page_size,
        "max_running_requests": workload.max_in_flight + workload.num_steady,
        "max_waiting_requests": workload.num_chats,
        "max_tokens_per_step": MAX_STEP_TOKENS,
    }
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
        found |= measure_multiturn(rank, workload, "chats")
        if rank.host_pages is not None and (tier := rank.host_pages.figures.tier) is not None:
            found["failed_loads"] = sum(tier.stats.failed_loads.values())
            found["failed_saves"] = sum(tier.stats.failed_saves.values())
    return found


def warm_up_of(workload: Workload) -> Workload:
    """Return a short workload of the same kinds of steps."""
    return dataclasses.replace(
        workload,
        num_chats=min(workload.num_chats, 4),
        num_turns=2,
        num_steady=1,
        steady_tokens=workload.steady_tokens // 10,
    )
