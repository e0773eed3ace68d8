"""The step's token budget follows what steps are measured to take, and starves nobody."""

from itertools import pairwise
from random import Random

import pytest

from tests.property.fake_group import FakeGroup
from workers.plan import BatchPlan, RelocationVersion
from workers.protocol import SamplingParams
from workers.scheduler.step_budget import (
    FIRST_PREFILL_TOKENS,
    MIN_PREFILL_TOKENS,
    StepBudget,
    StepLine,
)


def mixed(num_decoding, num_prefill):
    lens = [1] * num_decoding + ([num_prefill] if num_prefill else [])
    num_tokens = num_decoding + num_prefill
    rows = len(lens)
    return BatchPlan(
        1, RelocationVersion(1, 0), [], list(range(rows)), [0] * rows, lens, [5] * num_tokens, []
    )


def serve(budget, seconds_of, num_steps, num_decoding=8):
    """Plan full steps; return their tokens and seconds."""
    found = []
    for _ in range(num_steps):
        num_tokens = budget.num_tokens(num_decoding)
        seconds = seconds_of(num_tokens)
        budget.stepped(mixed(num_decoding, num_tokens - num_decoding), seconds)
        found.append((num_tokens, seconds))
    return found


def test_without_a_target_a_step_has_all_its_tokens():
    budget = StepBudget(512, None)
    assert {num for num, _ in serve(budget, lambda num_tokens: 9.0, 20)} == {512}


def test_with_nobody_to_hold_up_a_step_has_all_its_tokens():
    budget = StepBudget(512, 0.001)
    serve(budget, lambda num_tokens: 1.0, 20)
    assert budget.num_tokens(0) == 512


@pytest.mark.parametrize(("base_s", "token_s"), [(0.006, 20e-6), (0.0, 100e-6), (0.015, 5e-6)])
def test_steps_come_to_take_the_target(base_s, token_s):
    target_s = 0.02
    found = serve(StepBudget(4096, target_s), lambda num_tokens: base_s + token_s * num_tokens, 60)
    wanted = min((target_s - base_s) / token_s, 4096)
    assert found[0][0] == 8 + FIRST_PREFILL_TOKENS
    for num_tokens, seconds in found[20:]:
        assert num_tokens == pytest.approx(wanted, rel=0.1)
        assert seconds <= 1.05 * target_s
    lens = [num_tokens for num_tokens, _ in found]
    assert all(after <= 2 * before for before, after in pairwise(lens))


def test_steps_that_take_longer_than_they_did_become_shorter():
    """Contexts grow, another load comes to the device: the line follows."""
    budget, target_s = StepBudget(4096, 0.02), 0.02
    serve(budget, lambda num_tokens: 0.005 + 20e-6 * num_tokens, 60)
    slower = serve(budget, lambda num_tokens: 0.012 + 20e-6 * num_tokens, 60)
    assert slower[0][1] > 1.2 * target_s
    assert all(seconds <= 1.05 * target_s for _, seconds in slower[30:])


def test_noise_does_not_carry_the_budget_away():
    random = Random(3)

    def seconds_of(num_tokens):
        return (0.006 + 20e-6 * num_tokens) * random.uniform(0.85, 1.15)

    found = serve(StepBudget(4096, 0.02), seconds_of, 400)
    budgets = [num_tokens for num_tokens, _ in found[50:]]
    assert 450 < sum(budgets) / len(budgets) < 950  # 700 without noise
    assert max(budgets) < 1400


def test_one_step_that_was_held_up_changes_little():
    budget = StepBudget(4096, 0.02)
    serve(budget, lambda num_tokens: 0.006 + 20e-6 * num_tokens, 60)
    before = budget.num_tokens(8)
    budget.stepped(mixed(8, before - 8), 3.0)
    assert budget.num_tokens(8) > 0.75 * before
    serve(budget, lambda num_tokens: 0.006 + 20e-6 * num_tokens, 40)
    assert budget.num_tokens(8) == pytest.approx(700, rel=0.1)


SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def staircase(num_tokens):
    """What a padded step takes: 20 ms for 700 tokens, if there were such steps."""
    padded = next((size for size in SIZES if size >= num_tokens), num_tokens)
    return 0.006 + 20e-6 * padded


def test_a_step_has_the_tokens_of_one_that_is_prepared():
    """Else it would be padded, and take longer for nothing."""
    found = serve(StepBudget(1024, 0.02, SIZES), staircase, 100)
    assert {num_tokens for num_tokens, _ in found[20:]} == {640}
    without = serve(StepBudget(1024, 0.02), staircase, 100)
    assert max(seconds for _, seconds in without[20:]) > 0.021


def test_a_padded_step_counts_for_what_it_really_computed():
    budget = StepBudget(1024, 0.02, SIZES)
    for num_tokens in (129, 257, 513) * 20:  # the ends of prompts: each is padded to the next size
        budget.stepped(mixed(8, num_tokens - 8), staircase(num_tokens))
    assert budget.num_tokens(8) == 640


def test_a_least_part_fills_the_step_that_it_is_padded_to():
    found = serve(StepBudget(1024, 0.001, SIZES), staircase, 40, num_decoding=100)
    assert {num_tokens for num_tokens, _ in found[10:]} == {160}
    assert 160 >= 100 + MIN_PREFILL_TOKENS > 128


def test_a_target_out_of_reach_leaves_prompts_their_least_part():
    found = serve(StepBudget(4096, 0.001), lambda num_tokens: 0.05 + 20e-6 * num_tokens, 40, num_decoding=100)
    assert {num_tokens for num_tokens, _ in found[10:]} == {100 + MIN_PREFILL_TOKENS}


def test_a_line_through_two_lengths_is_theirs():
    line = StepLine()
    for _ in range(50):
        line.measured(100, 0.003)
        line.measured(300, 0.005)
    assert line.num_tokens(0.004) == pytest.approx(200, rel=0.02)


def serve_beside_a_stream(target_s, *, max_tokens=512, prompt_len=2000):
    """One request decodes while a long prompt comes; return the tokens of each step and when both ended."""
    group = FakeGroup(
        num_pages=1200,
        page_size=4,
        max_context_len=2100,
        max_tokens_per_step=max_tokens,
        target_s=target_s,
        seconds_of=lambda num_tokens: 0.004 + 50e-6 * num_tokens,
    )
    endless = SamplingParams(max_tokens=80, ignore_eos=True)
    stream = group.submit([1] * 4, endless)
    group.step()
    long = group.submit([2] * prompt_len, SamplingParams(max_tokens=1, ignore_eos=True))
    steps = []
    while group.scheduler.has_requests:
        plan = group.step()
        steps.append((sum(plan.lens), len(plan.slots)))
    group.settle()
    assert len(group.streams[stream]) == 80 and len(group.streams[long]) == 1
    return steps


def test_a_long_prompt_beside_a_stream_is_cut_to_the_target():
    beside = [num_tokens for num_tokens, num_rows in serve_beside_a_stream(0.014) if num_rows == 2]
    assert max(beside) < 1.1 * 200
    assert sum(beside[5:-1]) / len(beside[5:-1]) > 0.8 * 200
    whole = [num_tokens for num_tokens, num_rows in serve_beside_a_stream(None) if num_rows == 2]
    assert whole[:3] == [512] * 3


def test_beside_a_stream_a_long_prompt_leaves_half_a_step_to_short_ones_behind_it():
    """And has all of it where none is. Longer ones behind it wait: by then more of their prefix is known."""
    group = FakeGroup(
        num_pages=600,
        page_size=4,
        max_context_len=1000,
        max_tokens_per_step=64,
        max_running=8,
        target_s=1.0,
        seconds_of=lambda num_tokens: 1e-6 * num_tokens,
    )
    short = SamplingParams(max_tokens=1, ignore_eos=True)
    group.submit([1] * 4, SamplingParams(max_tokens=40, ignore_eos=True))
    group.step()
    group.submit([2] * 600, short)
    alone = [sorted(group.step().lens) for _ in range(2)]
    assert alone == [[1, 63], [1, 63]]
    long = group.submit([3] * 500, short)
    while group.scheduler.num_waiting:
        group.step()
    others = [group.submit([4 + number] * 10, short) for number in range(4)]
    assert sorted(group.step().lens) == [1, 10, 10, 10, 33]  # 32 of 63 are the long one's, and what is left
    assert group.reasons.keys() >= set(others[:3])
    assert group.scheduler.num_waiting == 1
    assert sorted(group.step().lens) == [1, 10, 53]
    twin = group.submit([3] * 500, short)
    assert sorted(group.step().lens) == [1, 63]
    group.run()
    assert group.reasons[long] == "length"
    assert group.num_cached[twin] > 500 - 63  # all but what the other computed in its last step
    group.settle()


def test_without_a_target_prompts_come_first_come_first_served():
    group = FakeGroup(num_pages=600, page_size=4, max_context_len=1000, max_tokens_per_step=64)
    group.submit([2] * 600, SamplingParams(max_tokens=1))
    group.submit([3] * 10, SamplingParams(max_tokens=1))
    assert group.step().lens == [64]
    assert group.scheduler.num_waiting == 1
