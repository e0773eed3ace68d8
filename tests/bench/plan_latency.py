"""How long a plan of rank 0 takes to reach the last follower on one host, by its bytes."""

import time
from typing import Any

from tests.bench.all_reduce import TIMEOUT_S, on_ranks
from tests.bench.measuring import quantile
from workers.parallel import TPGroup

SIZES = [256, 4 << 10, 64 << 10]
PAUSE_S = 0.002
"""Between plans, as between steps"""
_STAMP_BYTES = 8
_QUANTILES = {"p50_us": 0.5, "p99_us": 0.99}


def measure_plans(tp_size: int, device: str, *, is_quick: bool) -> dict[str, Any]:
    """Return microseconds by bytes: see `until_the_last`."""
    num_plans = 50 if is_quick else 500
    of_ranks = on_ranks(tp_size, device, _exchange, num_plans)
    return {str(size): until_the_last([told[size] for told in of_ranks[1:]]) for size in SIZES}


def until_the_last(of_followers: list[list[float]]) -> dict[str, float]:
    """Return the median and the 99th percentile over plans, in microseconds, of how long each took to reach
    the follower that had it last; seconds of every plan, in order, as each follower tells them."""
    of_plans = [max(took) for took in zip(*of_followers, strict=True)]
    return {name: round(1e6 * quantile(of_plans, ratio), 1) for name, ratio in _QUANTILES.items()}


def _exchange(group: TPGroup, device: str, num_plans: int) -> dict[int, list[float]]:
    """Send plans, or return how long each was on its way: the clock is the machine's."""
    took: dict[int, list[float]] = {size: [] for size in SIZES}
    for size in SIZES:
        for _ in range(num_plans):
            if group.rank == 0:
                time.sleep(PAUSE_S)
                rest = bytes(size - _STAMP_BYTES)
                group.broadcast_plan(time.monotonic_ns().to_bytes(_STAMP_BYTES, "little") + rest)
            else:
                plan = group.receive_plan(TIMEOUT_S)
                sent_ns = int.from_bytes(plan[:_STAMP_BYTES], "little")
                took[size].append((time.monotonic_ns() - sent_ns) / 1e9)
    return took
