"""FlashInferAttention in buckets that verify, over a fake of the library: plans and partial results."""

import pytest
import torch

from tests.unit.test_flashinfer_attention import Staged, attention_over, compared
from workers.attention.flashinfer_kernels import PlanLimits


def test_the_largest_verify_bucket_has_room_for_partial_results() -> None:
    staged = Staged()
    for max_verified in (0, 24):
        attention, _ = attention_over(staged.pool, max_verified=max_verified)
        inputs = staged.bucket("verify", 24)
        if max_verified:
            found, expected = compared(staged, attention, staged.plan(s0=(9, 4), s1=(3, 4)), inputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(AssertionError, match="find no room"):
                compared(staged, attention, staged.plan(s0=(9, 4), s1=(3, 4)), inputs)


def test_a_verify_bucket_s_rows_are_short_and_of_any_number() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    inputs = staged.bucket("verify", 8)
    for plan in (
        staged.plan(s0=(9, 4), s1=(3, 4)),
        staged.plan(s3=(40, 1), s1=(8, 3), s0=(60, 4)),
        staged.plan(s2=(7, 2)),
    ):
        found, expected = compared(staged, attention, plan, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    short = library.kernels("short")
    assert [plan.query_starts.tolist() for plan in short.plans] == [
        [0, 4, 8, 8, 8, 8, 8, 8, 8],
        [0, 1, 4, 8, 8, 8, 8, 8, 8],
        [0, 2, 8, 8, 8, 8, 8, 8, 8],  # the pads' row
    ]
    assert all(plan.is_captured and plan.num_tokens == 8 for plan in short.plans)
    assert short.limits[-1] == PlanLimits(8, 8, is_captured=True)
    assert not library.kernels("long").plans


def test_a_plan_by_pages_holds_until_pages_or_rows_change() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    short = library.kernels("short")
    short.plans_by_pages = True
    inputs = staged.bucket("verify", 8)
    num_plans = []
    for plan in (
        staged.plan(s0=(9, 2), s1=(4, 2)),  # pages of 4 tokens
        staged.plan(s0=(10, 2), s1=(5, 2)),
        staged.plan(s0=(11, 2), s1=(6, 2)),  # the first has another page
        staged.plan(s0=(12, 2), s1=(6, 2)),
        staged.plan(s0=(13, 1), s1=(5, 3)),
    ):
        found, expected = compared(staged, attention, plan, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        num_plans.append(len(short.plans))
    assert num_plans == [1, 1, 2, 2, 3]
