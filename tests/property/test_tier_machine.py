"""Groups whose pages also live in an arena and elsewhere, with bad luck: a state machine, and lives by seed.

Moves end late, in any order, apart on each rank, and fail; news of the arena comes late; it evicts, corrupts
and restarts; FETCHes end late, in part, twice or never. Still each request gets its own text, and nothing is
held in the end.
"""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.fake_mover import Faults
from tests.property.fake_sources import SourceOptions
from tests.property.fake_tier import TierOptions
from tests.property.random_tier import live
from tests.property.sanitized_rank import SanitizedRank
from tests.property.test_scheduler_machine import DRAFT_TOKENS, TEXTS, SchedulerMachine, with_room
from workers.protocol import SamplingParams

_ratio = st.sampled_from([0.0, 0.0, 0.1, 0.3])
_speed = st.sampled_from([0.2, 0.5, 1.0])
_faults = st.builds(
    Faults, io_ratio=st.sampled_from([0.0, 0.0, 0.0, 0.2, 1.0]), stale_ratio=_ratio, torn_ratio=_ratio
)
_sources = st.builds(
    SourceOptions,
    policy=st.sampled_from(["wait_complete", "best_effort", "timeout"]),
    timeout_s=st.sampled_from([5.0, 1.0]),
    page_s=st.sampled_from([0.5, 0.5, 3.0]),
    speed=st.sampled_from([1.0, 0.5, 0.2]),
    silent_ratio=st.sampled_from([0.0, 0.0, 0.2]),
    failure_ratio=st.sampled_from([0.0, 0.0, 0.1]),
    twice_ratio=st.sampled_from([0.0, 0.3]),
    put_ratio=st.sampled_from([0.3, 0.0]),
)
_tiers = st.builds(
    TierOptions,
    num_slots=st.sampled_from([1, 4, 12, 20, 30]),
    policy=st.sampled_from(["write_through", "write_through_selective", "write_back"]),
    capacity=st.sampled_from([64, 8, 2]),
    speeds=st.tuples(_speed, _speed),
    news_ratio=st.sampled_from([1.0, 0.5, 0.2]),
    upset_ratio=st.sampled_from([0.0, 0.1]),
    faults=_faults,
    sources=_sources,
    seed=st.integers(0, 1 << 16),
)


class TierMachine(SchedulerMachine):
    """Half of the time pages are real bytes under the sanitizer; else a torn page holds foreign tokens."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(3, 14),
        num_ranks=st.integers(1, 2),
        max_running=st.integers(1, 5),
        max_tokens_per_step=st.integers(1, 24),
        depth=st.integers(0, 1),
        draft_tokens=DRAFT_TOKENS,
        target_s=st.sampled_from([None, 0.05]),
        tier=_tiers,
        is_sanitized=st.booleans(),
    )
    def start(self, is_sanitized: bool, **options: Any) -> None:
        self.group = FakeGroup(
            **with_room(options),
            max_context_len=24,
            safety=self.safety,
            runs_checks=self.runs_checks,
            make_rank=SanitizedRank if is_sanitized else plain_rank,
        )

    @precondition(lambda self: len(self.group.unfinished) < 6)
    @rule(first=st.sampled_from(TEXTS), second=st.sampled_from(TEXTS), prompt_len=st.integers(8, 23))
    def take_turns(self, first: list[int], second: list[int], prompt_len: int) -> None:
        """Two texts push each other out of the device, and come back."""
        for text in (first, second, first):
            token_ids = text[: min(prompt_len, self.group.scheduler.max_context_len - 1)]
            hints = self.group.tier.sources.hints(prompt_len // self.group.cache.page_size)
            self.group.submit(token_ids, SamplingParams(max_tokens=2), hints=hints)
            for _ in range(8):
                self.group.step()

    @rule()
    def upset(self) -> None:
        self.group.tier.upset()

    def teardown(self) -> None:
        if not hasattr(self, "group") or self.group.is_midstep:
            return
        self.group.end()


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def live_all(seeds: range) -> Counter[str]:
    """Return what all lives came to."""
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            group = live(seed, draft_tokens=Random(f"drafts/{seed}").choice([0, 0, 1, 3, "auto"]))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        stats = group.tier.stats
        total.update(saved=stats.num_saved_pages, loaded=stats.num_loaded_pages, lost=stats.num_lost_pages)
        total.update({f"save {reason}": count for reason, count in stats.failed_saves.items()})
        total.update({f"load {reason}": count for reason, count in stats.failed_loads.items()})
        total.update({f"skip {reason}": count for reason, count in stats.skipped_saves.items()})
        total.update(preempted=group.scheduler.stats.num_preemptions)
        fetches = group.tier.prefetcher.stats
        total.update({f"fetched {source}": count for source, count in fetches.fetched_pages.items()})
        total.update({f"fetch {reason}": count for (_, reason), count in fetches.failed_pages.items()})
        total.update({f"unfetched {reason}": count for reason, count in fetches.skipped_pages.items()})
        origins = group.scheduler.stats.prefix_tokens
        total.update({f"prefix {origin}": count for origin, count in origins.items()})
    return total


def test_whatever_becomes_of_moves_each_request_gets_its_own_text():
    total = live_all(range(100))
    happened = {"saved", "loaded", "lost", "preempted", "save io", "save stale", "save no_parent"}
    happened |= {"load io", "load stale", "load corrupt", "load torn"}
    happened |= {"skip no_grant", "skip no_parent", "skip busy"}
    happened |= {"fetched peer", "fetched remote", "fetch missing", "fetch no_slot", "fetch timed_out"}
    happened |= {"fetch failed", "fetch corrupt", "fetch timeout", "fetch lost"}
    happened |= {"unfetched no_source", "unfetched slower", "unfetched present", "unfetched breaker_open"}
    happened |= {f"prefix {origin}" for origin in ("computed", "device", "host", "peer", "remote")}
    assert {name for name, count in total.items() if count} == happened


@pytest.mark.slow
def test_whatever_becomes_of_moves_in_the_long_run():
    live_all(range(100, 1000))
