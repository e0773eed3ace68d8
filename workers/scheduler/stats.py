"""SchedulerStats: what the Scheduler counts and observes. It writes, workers.metrics reads."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from workers.kvcache.arrivals import Origin
from workers.kvcache.manager import KVCacheManager
from workers.plan import Mode
from workers.protocol import FinishReason, LoadReport
from workers.scheduler.draft_length import DraftSwitch

PrefixOrigin = Literal["computed"] | Origin
DraftOutcome = Literal["accepted", "rejected"]
"""A draft behind a rejected one is rejected, too."""


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; `queue_s` is emptied by who reads it."""

    num_finished: Counter[FinishReason] = field(default_factory=Counter)
    num_refused: Counter[str] = field(default_factory=Counter)
    """By RequestOutput.error_code."""
    num_preemptions: int = 0
    num_unproven_rows: int = 0
    """Rows to be computed again: what became of a LOAD that they read was not known when their step ended."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the cache, of the requests that got a token."""
    prefix_tokens: Counter[PrefixOrigin] = field(default_factory=Counter)
    """All prompt tokens of these requests, by where they were found, or `computed`."""
    num_generated_tokens: int = 0
    num_drafts: Counter[tuple[int, DraftOutcome]] = field(default_factory=Counter)
    """Drafted tokens by their place behind the known ones, from 1, and by what became of them."""
    num_reached_drafts: Counter[int] = field(default_factory=Counter)
    """Those behind right ones alone, by their place."""
    accept_lengths: Counter[tuple[PrefixOrigin, int]] = field(default_factory=Counter)
    """Rows that verified drafts by how many tokens that brought, the one sampled behind the right drafts
    included, and by where the most of their request's prompt was found."""
    step_tokens: Counter[Mode] = field(default_factory=Counter)
    """Tokens sampled and kept, by mode of the step."""
    draft_steps: Counter[int] = field(default_factory=Counter)
    """With a draft: steps that sampled, by how many tokens were drafted for each row."""
    draft_switches: Counter[DraftSwitch] = field(default_factory=Counter)
    """How often `auto` began or ceased to draft, and why."""
    queue_s: list[float] = field(default_factory=list)
    """Arrival to first admission, of each request that was admitted first since it was emptied."""

    def prompted(self, prompt_len: int, num_cached: int, origins: Mapping[Origin, int]) -> None:
        """Count a request that got its first token: where its prompt came from is settled."""
        self.num_cached_tokens += num_cached
        self.prefix_tokens.update(origins)
        self.prefix_tokens["computed"] += prompt_len - num_cached

    def verified(self, num_drafts: int, num_found: int, origin: PrefixOrigin, num_rows: int = 1) -> None:
        """Count rows to each of which the verifying of `num_drafts` drafts brought `num_found` tokens, for
        requests the most of whose prompts was found at `origin`."""
        for place in range(1, num_drafts + 1):
            self.num_drafts[place, "accepted" if place < num_found else "rejected"] += num_rows
            self.num_reached_drafts[place] += num_rows * (place <= num_found)
        self.accept_lengths[origin, num_found] += num_rows


def load_report(
    cache: KVCacheManager,
    num_running: int,
    num_waiting: int,
    num_prefill_tokens: int,
    step_s: float,
    now_s: float,
) -> LoadReport:
    """Return a replica's load from its Scheduler's counts and its cache's."""
    pages, times = cache.stats(), cache.costs.page_times(now_s)
    return LoadReport(
        num_running=num_running,
        num_waiting=num_waiting,
        num_prefill_tokens=num_prefill_tokens,
        num_pages=cache.num_pages,
        num_free_pages=pages.num_free_pages,
        num_cached_pages=pages.num_evictable_pages,
        step_s=step_s,
        load_page_s=times.load_s,
        peer_page_s=times.peer_s,
        remote_page_s=times.remote_s,
    )
