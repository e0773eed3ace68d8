"""A state machine drives add, abort and step over a pool so tiny that it evicts, on one or two ranks.

The real sanitizer watches every rank.
"""

from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.property.fake_group import VOCAB_SIZE, FakeGroup, least_pages, least_step_tokens
from tests.property.sanitized_rank import SanitizedRank
from workers.engine.forward_batch import ForwardBatch
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.page_pool import Safety
from workers.kvcache.page_table import PageTableError
from workers.kvcache.sanitizer import SanitizerError
from workers.protocol import SamplingParams

# Prompts are cut from three texts, so that they share prefixes; the last differs from the first at its end.
TEXTS = ([1] * 64, [2, 1] * 32, [1] * 5 + [8] * 59)

_sampling = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 20),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8),
    seed=st.sampled_from([None, 0, 1]),
)

DRAFT_TOKENS = st.sampled_from([0, 0, 1, 3, "auto"])


def with_room(options: dict[str, Any]) -> dict[str, Any]:
    """Return a group's options, of which those without a draft stay as they are, such that drafts fit in."""
    if not options["draft_tokens"]:
        return options
    num_tokens, num_pages = options["max_tokens_per_step"], options["num_pages"]
    return options | {
        "max_tokens_per_step": max(num_tokens, least_step_tokens(options["draft_tokens"])),
        "num_pages": max(num_pages, least_pages(options["draft_tokens"], options["page_size"])),
    }


class SchedulerMachine(RuleBasedStateMachine):
    group: FakeGroup
    rank_type: type[SanitizedRank] = SanitizedRank
    safety = Safety()
    runs_checks = True

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(3, 24),
        num_ranks=st.integers(1, 2),
        max_running=st.integers(1, 6),
        max_tokens_per_step=st.integers(1, 24),
        prefix_caching=st.sampled_from([True, True, True, False]),
        depth=st.integers(0, 1),
        draft_tokens=DRAFT_TOKENS,
        target_s=st.sampled_from([None, 0.05]),
    )
    def start(self, **options: Any) -> None:
        self.group = FakeGroup(
            **with_room(options),
            max_context_len=30,
            safety=self.safety,
            runs_checks=self.runs_checks,
            make_rank=self.rank_type,
        )

    @precondition(lambda self: len(self.group.unfinished) < 10)
    @rule(
        text=st.sampled_from(TEXTS),
        prompt_len=st.integers(1, 29),
        num_copies=st.integers(1, 4),
        sampling=_sampling,
        priority=st.integers(0, 2),
        tenant_salt=st.sampled_from([b"", b"", b"tenant"]),
    )
    def add(
        self,
        text: list[int],
        prompt_len: int,
        num_copies: int,
        sampling: SamplingParams,
        priority: int,
        tenant_salt: bytes,
    ) -> None:
        token_ids = text[: min(prompt_len, self.group.scheduler.max_context_len - 1)]
        for _ in range(num_copies):
            self.group.submit(token_ids, sampling, priority=priority, tenant_salt=tenant_salt)

    @precondition(lambda self: self.group.submits)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.group.abort(data.draw(st.sampled_from(sorted(self.group.submits))))

    @rule(lags=st.tuples(st.integers(0, 3), st.integers(0, 3)), num_steps=st.integers(1, 5))
    def step(self, lags: tuple[int, int], num_steps: int) -> None:
        for _ in range(num_steps):
            self.group.step(lags=lags[: len(self.group.ranks)])

    @precondition(lambda self: self.group.unfinished)
    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        self.group.step(abort_in_flight=data.draw(st.sampled_from(self.group.unfinished)))

    def teardown(self) -> None:
        if not hasattr(self, "group") or self.group.is_midstep:
            return  # what failed says more than what follows from it
        # The first in order gains a token in every step and is never preempted: no livelock.
        num_left = sum(self.group.scheduler.max_context_len for _ in self.group.unfinished)
        # With a depth of 1 it may wait a step for pages that the one in flight still has.
        self.group.run(max_steps=(1 + self.group.depth) * (num_left + 1))
        assert self.group.reasons.keys() == self.group.submits.keys(), "a request has no finish reason"
        self.group.settle()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class NoGenerations(SchedulerMachine):
    """Pages are handed out again under the generation they had."""

    safety = Safety(generations=False)


class NoReservations(SchedulerMachine):
    """Rows run without the pages they write to; nobody but the ranks checks."""

    safety = Safety(reservations=False)
    runs_checks = False


class WithStaleRows(SanitizedRank):
    mechanisms = Mechanisms(copies_rows=False)


class StaleRows(SchedulerMachine):
    """Decode rows read the page rows of the first decode step."""

    rank_type = WithStaleRows


class WithStrayWrites(SanitizedRank):
    def forward(self, batch: ForwardBatch) -> list[torch.Tensor]:
        contexts = super().forward(batch)
        for half in self.pool.layer(0):
            half[-1] = 1.0
        return contexts


class StrayWrites(SchedulerMachine):
    """Each step also writes to the pool's last page, whosesoever it is."""

    rank_type = WithStrayWrites


@pytest.mark.parametrize(
    ("machine", "error", "check"),
    [
        (NoGenerations, SanitizerError, "generation_rises"),
        (
            NoReservations,
            (PageTableError, AssertionError),
            "has no page for position|drafts beyond its pages",
        ),
        (StaleRows, SanitizerError, "staged_row|pad_rows"),
        (StrayWrites, SanitizerError, "free_page_untouched"),
    ],
)
def test_the_sanitizer_is_on_in_this_machine(machine, error, check):
    quick = settings(
        max_examples=200,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate],
    )
    with pytest.raises(error, match=check):
        run_state_machine_as_test(machine, settings=quick)
