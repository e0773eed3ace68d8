"""What it costs to place a request on a replica, in seconds, and the one constant it is measured with.

Pure functions and one running mean; called on the event loop.
"""

from dataclasses import dataclass

from cluster.router.books import Load
from cluster.router.ways import Way

FIRST_PREFILL_TOKEN_S = 1e-3
"""Until measured: a small model on a CPU."""
MIN_MEASURED_TOKENS = 32
"""Shorter prefills say more of a step's fixed cost than of a token's."""
RATE_MEMORY = 0.9
"""Weight of the past in the running mean."""


class PrefillRate:
    """Seconds a prompt token takes: a running mean of what first tokens took, over all replicas.

    They run one configuration. A rate for each would leave one that was slow once without the requests that
    would show it fast again; a slow replica shows in its queue.
    """

    def __init__(self) -> None:
        self.token_s = FIRST_PREFILL_TOKEN_S
        self._is_measured = False

    def observe(self, num_tokens: int, duration_s: float) -> None:
        """Take in one request: the tokens ahead of it and its own, and the time to its first token."""
        if num_tokens < MIN_MEASURED_TOKENS:
            return
        measured = duration_s / num_tokens
        past = self.token_s if self._is_measured else measured
        self.token_s = RATE_MEMORY * past + (1 - RATE_MEMORY) * measured
        self._is_measured = True


@dataclass(frozen=True)
class Cost:
    """The terms of one placement, in seconds."""

    queue_s: float
    """Prefill that stands before the request."""
    prefill_s: float
    """Of what is computed there."""
    kv_wait_s: float
    """Until pages that others hold come free."""
    slowdown_s: float
    """What the running requests, and the next to come, lose to its prefill, all together. Copies run beside
    the steps: they cost the others nothing."""
    copy_s: float = 0.0
    """Of pages that are loaded, or fetched and loaded."""

    @property
    def own_s(self) -> float:
        """What the request itself waits for its first token."""
        return self.queue_s + self.copy_s + self.prefill_s + self.kv_wait_s

    @property
    def total_s(self) -> float:
        """What everyone pays."""
        return self.own_s + self.slowdown_s


def placement_cost(load: Load, way: Way, num_new_pages: int, page_size: int, token_s: float) -> Cost:
    """Return what it costs to place a request there that comes to its KV this way.

    Pages that are lacking are priced as the computation they displace: whoever holds them is preempted and
    computes them again, or the request waits about as long.
    """
    num_lacking = 0
    if load.num_available_pages is not None:
        num_lacking = max(0, num_new_pages - load.num_available_pages)
    prefill_s = way.num_computed_tokens * token_s
    return Cost(
        queue_s=load.num_prefill_tokens * token_s,
        prefill_s=prefill_s,
        kv_wait_s=num_lacking * page_size * token_s,
        slowdown_s=prefill_s * (load.num_running + 1),
        copy_s=way.copy_s,
    )
