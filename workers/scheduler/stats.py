"""SchedulerStats: what the Scheduler counts and observes. It writes, workers.metrics reads."""

from collections import Counter
from dataclasses import dataclass, field

from workers.protocol import FinishReason


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; observations in seconds, cleared when the next step is planned."""

    num_finished: Counter[FinishReason] = field(default_factory=Counter)
    num_refused: Counter[str] = field(default_factory=Counter)
    """By RequestOutput.error_code."""
    num_preemptions: int = 0
    num_stalls: int = 0
    """Rows left out of a step because their pages were quiescing or held by requests ahead."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache at first admission."""
    num_generated_tokens: int = 0
    queue_s: list[float] = field(default_factory=list)
    """Arrival to first admission."""
    first_token_s: list[float] = field(default_factory=list)
    """Arrival to first token."""
    inter_token_s: list[float] = field(default_factory=list)
    """One token of a request to its next."""

    def clear_observations(self) -> None:
        """Make room for the next step's."""
        self.queue_s.clear()
        self.first_token_s.clear()
        self.inter_token_s.clear()
