"""SchedulerStats: what the Scheduler counts and observes. It writes, workers.metrics reads."""

from collections import Counter
from dataclasses import dataclass, field

from workers.protocol import FinishReason


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; `queue_s` is emptied when the next step is planned."""

    num_finished: Counter[FinishReason] = field(default_factory=Counter)
    num_refused: Counter[str] = field(default_factory=Counter)
    """By RequestOutput.error_code."""
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache at first admission."""
    num_generated_tokens: int = 0
    queue_s: list[float] = field(default_factory=list)
    """Arrival to first admission, of the requests that the last planned step admitted first."""
