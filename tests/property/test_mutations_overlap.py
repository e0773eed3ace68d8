"""Each mechanism that lets a step be planned while one runs, switched off alone, makes a named check fire."""

from dataclasses import replace

import pytest

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.sanitized_rank import SanitizedRank
from workers.kvcache.page_pool import Safety
from workers.protocol import SamplingParams

ALL_ON = Safety()


def endless(max_tokens: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def outgrow_pages(safety: Safety, **options: object) -> FakeGroup:
    """Requests go on over the ends of their pages, each by a token that nobody has seen yet."""
    group = FakeGroup(num_pages=12, page_size=2, depth=1, safety=safety, **options)
    for number in range(3):
        group.submit([number] * 3, endless(9))
    group.run()
    group.settle()
    return group


def end_by_a_token(safety: Safety, **options: object) -> FakeGroup:
    """Requests end by what they sample, with a row in the step in flight; others take their pages at once."""
    group = FakeGroup(num_pages=8, page_size=2, max_context_len=16, depth=1, safety=safety, **options)
    for number in range(12):
        group.submit([number] * 4, SamplingParams(seed=number))
        for _ in range(4):
            group.step()
    group.run()
    group.settle()
    assert "stop" in group.reasons.values()
    return group


def come_back_at_once(safety: Safety, **options: object) -> FakeGroup:
    """A request with a row in flight gives way to an urgent one and is admitted again in the same step."""
    group = FakeGroup(
        num_pages=24,
        page_size=1,
        max_context_len=30,
        max_tokens_per_step=16,
        depth=1,
        safety=safety,
        **options,
    )
    group.submit([1] * 14, endless(4))
    group.submit([1] * 15 + [2] * 2, endless(4))
    group.step()
    group.submit([9] * 9, endless(2), priority=-1)
    group.run()
    group.settle()
    assert group.scheduler.stats.num_preemptions > 0
    return group


@pytest.mark.parametrize("make_rank", [plain_rank, SanitizedRank])
@pytest.mark.parametrize("scene", [outgrow_pages, end_by_a_token, come_back_at_once])
def test_with_everything_on_no_check_fires(scene, make_rank):
    scene(ALL_ON, make_rank=make_rank)


@pytest.mark.parametrize(
    ("switch", "scene", "check"),
    [
        ("reserves_ahead", outgrow_pages, r"reserve: slot \d writes beyond its pages"),
        ("fences", end_by_a_token, r"fence: page \d+ is freed while step \[\d+\] may touch it"),
        ("voids_rows", come_back_at_once, r"slot \d wrote \d+ tokens into \d+ pages"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(switch, scene, check):
    with pytest.raises(AssertionError, match=check):
        scene(replace(ALL_ON, **{switch: False}))
