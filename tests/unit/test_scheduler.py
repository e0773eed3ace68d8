from random import Random

import pytest

from tests.property.fake_group import END_TOKEN_IDS, VOCAB_SIZE, FakeGroup
from workers.plan import (
    CompletePages,
    OpenSlot,
    OwnPages,
    RelocationVersion,
    RelocationVersionError,
    StepOutput,
)
from workers.protocol import RequestId, SamplingParams, SubmitRequest


def greedy(max_tokens: int | None = None, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0, **options)


def test_a_request_runs_to_its_end():
    group = FakeGroup()
    request = group.submit([1, 2, 3], greedy(5))
    assert group.run() == 5
    assert len(group.streams[request]) == 5 and group.reasons[request] == "length"
    group.settle()


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget():
    group = FakeGroup(max_tokens_per_step=16)
    group.submit([1] * 40, greedy(1))
    plans = [group.step() for _ in range(3)]
    assert [(plan.starts, plan.lens, plan.sampled) for plan in plans] == [
        ([0], [16], []),
        ([16], [16], []),
        ([32], [8], [0]),
    ]
    assert [plan.mode for plan in plans] == ["extend"] * 3


def test_decodes_never_wait_behind_a_long_prompt():
    group = FakeGroup(max_tokens_per_step=8, num_pages=32)
    chats = [group.submit([number], greedy(20)) for number in range(3)]
    group.step()
    long = group.submit([9] * 40, greedy(4))
    while not group.streams[long]:
        before = [len(group.streams[chat]) for chat in chats]
        plan = group.step()
        assert plan.mode == "mixed" and plan.lens == [1, 1, 1, 5]
        assert [len(group.streams[chat]) for chat in chats] == [count + 1 for count in before]


def test_decodes_stand_before_chunks_and_only_last_tokens_are_sampled():
    group = FakeGroup(max_tokens_per_step=8)
    group.submit([1] * 30, greedy(4))
    group.step()
    group.submit([2], greedy(4), priority=-1)
    plans = [group.step(), group.step()]
    assert [(plan.starts, plan.lens, plan.sampled) for plan in plans] == [
        ([0, 8], [1, 7], [0]),
        ([1, 15], [1, 7], [0]),
    ]


def test_a_prompt_of_higher_priority_goes_before_the_chunks_of_a_lower():
    group = FakeGroup(max_tokens_per_step=8)
    low = group.submit([1] * 30, greedy(4), priority=1)
    group.step()
    high = group.submit([2] * 12, greedy(1), priority=0)
    plans = [group.step(), group.step()]
    assert [plan.lens for plan in plans] == [[8], [4, 4]]
    assert high in group.reasons
    group.run()
    assert low in group.reasons


def test_requests_start_first_come_first_served_within_their_priority():
    group = FakeGroup(max_running=1)
    names = [group.submit([1], greedy(1), priority=priority) for priority in (1, 0, 1, 0)]
    while group.scheduler.has_requests:
        group.step()
    assert list(group.reasons) == [names[1], names[3], names[0], names[2]]


def test_there_are_never_more_running_requests_than_tokens_in_a_step():
    group = FakeGroup(max_running=4, max_tokens_per_step=2)
    for number in range(4):
        group.submit([number] * 10, greedy(10))
    while group.scheduler.has_requests:
        group.step()
        assert group.scheduler.num_running <= 2


def test_the_token_budget_bounds_running_requests_of_all_priorities():
    group = FakeGroup(max_running=4, max_tokens_per_step=2)
    group.submit([1] * 20, greedy(4), priority=1)
    for number in range(3):
        group.step()
        group.submit([number], greedy(10), priority=0)
    while group.scheduler.has_requests:
        group.step()
        assert group.scheduler.num_running <= 2


def test_the_first_in_order_progresses_though_decodes_fill_the_step():
    group = FakeGroup(max_running=3, max_tokens_per_step=3)
    for number in (1, 2):
        group.submit([number], greedy(30), priority=1)
    group.step()
    first = group.submit([5] * 10, greedy(1))
    for _ in range(11):
        group.step()
    assert first in group.reasons and len(group.reasons) == 1


def test_the_context_ends_a_request_with_length():
    group = FakeGroup(max_context_len=10)
    request = group.submit([1] * 7, greedy(None))
    group.run()
    assert len(group.streams[request]) == 3 and group.reasons[request] == "length"


def test_the_pool_bounds_the_context():
    group = FakeGroup(num_pages=3, page_size=4, max_context_len=48)
    assert group.scheduler.max_context_len == 12
    request = group.submit([1] * 11, greedy(None))
    group.run()
    assert group.reasons[request] == "length"


def find_seed(prompt: list[int], sampling: SamplingParams, first_end: range) -> SamplingParams:
    """A seed under which the first end token is generated within `first_end`, end tokens not banned."""
    group = FakeGroup()
    for seed in range(1000):
        probe = SamplingParams(max_tokens=20, seed=seed, stop_token_ids=sampling.stop_token_ids)
        request = group.submit(prompt, probe)
        stream, reason = group.expected(request)
        group.abort(request)
        if reason == "stop" and len(stream) - 1 in first_end:
            return probe
    raise AssertionError("no seed found")


def test_an_end_token_stops_a_request_and_is_its_last_token():
    sampling = find_seed([1], SamplingParams(), range(2, 10))
    group = FakeGroup()
    request = group.submit([1], sampling)
    group.run()
    assert group.reasons[request] == "stop" and group.streams[request][-1] in END_TOKEN_IDS
    assert not set(group.streams[request][:-1]) & set(END_TOKEN_IDS)


def test_ignore_eos_ignores_the_models_end_tokens_and_not_the_requests_own():
    group = FakeGroup()
    endless = find_seed([1], SamplingParams(), range(1, 5))
    request = group.submit([1], SamplingParams(max_tokens=12, ignore_eos=True, seed=endless.seed))
    own = list(range(20, 60))
    stopped = group.submit([1], SamplingParams(max_tokens=20, ignore_eos=True, seed=1, stop_token_ids=own))
    plan = group.step()
    assert all(op.end_token_ids == [] for op in plan.ops if isinstance(op, OpenSlot))
    group.run()
    assert len(group.streams[request]) == 12 and set(group.streams[request]) & set(END_TOKEN_IDS)
    assert group.reasons[stopped] == "stop" and group.streams[stopped][-1] in own


def test_min_tokens_holds_for_all_tokens_that_end_a_request():
    own = list(range(10, 50))
    early = find_seed([1], SamplingParams(stop_token_ids=own), range(0, 2))
    group = FakeGroup()
    sampling = SamplingParams(max_tokens=30, min_tokens=6, seed=early.seed, stop_token_ids=own)
    request = group.submit([1], sampling)
    plan = group.step()
    (op,) = (op for op in plan.ops if isinstance(op, OpenSlot))
    assert op.end_token_ids == END_TOKEN_IDS and op.sampling.min_tokens == 6
    group.run()
    assert len(group.streams[request]) >= 7 and group.reasons[request] == "stop"
    assert not set(group.streams[request][:6]) & {*own, *END_TOKEN_IDS}


def test_an_end_token_below_min_tokens_does_not_stop_a_request():
    group = FakeGroup()
    request = group.scheduler
    request.add(SubmitRequest(RequestId("x"), [1], SamplingParams(min_tokens=2, max_tokens=9)), 0.0)
    ended = []
    for number in range(1, 4):
        plan = request.plan(0.0)
        (output,) = request.commit(StepOutput(plan.step, plan.relocation_version, [END_TOKEN_IDS[0]], [None]))
        ended.append((number, output.finish_reason))
    assert ended == [(1, None), (2, None), (3, "stop")]


def test_a_request_without_a_seed_gets_one_at_admission_and_keeps_its_own_otherwise():
    group = FakeGroup()
    group.submit([1], SamplingParams(max_tokens=2))
    group.submit([2], SamplingParams(max_tokens=2, seed=42))
    group.submit([3], SamplingParams(max_tokens=2))
    plan = group.step()
    seeds = [op.seed for op in plan.ops if isinstance(op, OpenSlot)]
    source = Random(5)
    assert seeds == [source.getrandbits(63), 42, source.getrandbits(63)]


def test_pages_of_a_token_that_is_not_known_yet_are_reserved_before_its_step():
    group = FakeGroup(page_size=4, depth=1)
    group.submit([1] * 8, greedy(8))
    first, second = group.step(), group.step()
    owned = [[len(op.pages) for op in plan.ops if isinstance(op, OwnPages)] for plan in (first, second)]
    assert owned == [[2], [1]]
    assert (second.num_awaited, second.token_ids, second.starts, second.lens) == (1, [], [8], [1])
    group.run()


def test_a_request_that_ends_with_the_step_in_flight_is_not_planned_again():
    group = FakeGroup(depth=1)
    group.submit([1] * 3, greedy(2))
    longer = group.submit([2] * 3, greedy(5))
    plans = []
    while group.scheduler.has_requests:
        plans.append(group.step())
    assert [len(plan.slots) for plan in plans if plan] == [2, 2, 1, 1, 1]
    assert group.reasons[longer] == "length"


def test_ops_wait_for_the_step_in_flight_rather_than_go_without_rows():
    group = FakeGroup(page_size=4, depth=1)
    group.submit([1] * 4, greedy(2))
    plans = [group.step() for _ in range(5)]
    assert [plan and len(plan.slots) for plan in plans] == [1, 1, None, 0, None]
    assert any(isinstance(op, CompletePages) for op in plans[3].ops)


def test_nobody_gives_way_for_pages_that_a_request_at_its_end_still_has():
    group = FakeGroup(num_pages=11, page_size=1, prefix_caching=False, depth=1)
    group.submit([1] * 3, greedy(2))
    for number in (2, 3):
        group.submit([number] * 3, greedy(3))
    group.run()
    assert group.scheduler.stats.num_preemptions == 0
    group.settle()


def test_nobody_gives_way_for_a_slot_that_comes_free_with_the_step_in_flight():
    group = FakeGroup(max_running=2, depth=1)
    group.submit([1] * 3, greedy(2))
    low = group.submit([2] * 3, greedy(10), priority=1)
    group.step()
    group.step()
    urgent = group.submit([3], greedy(2))
    group.run()
    assert group.scheduler.stats.num_preemptions == 0
    assert list(group.reasons)[1:] == [urgent, low]


def test_what_a_step_brings_for_a_request_that_has_ended_is_void():
    """An end token is seen one step late: the row that went on beyond it counts for nothing."""
    sampling = find_seed([1], SamplingParams(), range(2, 10))
    plain, ahead = FakeGroup(depth=0), FakeGroup(depth=1)
    for group in (plain, ahead):
        group.submit([1], sampling)
        group.run()
        group.settle()
    assert ahead.streams == plain.streams and ahead.reasons == plain.reasons
    assert ahead.scheduler.stats == plain.scheduler.stats
    assert ahead.cache.snapshot() == plain.cache.snapshot()
    assert ahead.ranks[0].last_step > plain.ranks[0].last_step


def test_a_preempted_request_s_row_in_flight_is_void_and_computed_again():
    group = FakeGroup(num_pages=6, page_size=2, max_context_len=12, prefix_caching=False, depth=1)
    requests = [group.submit([number], greedy(None)) for number in range(3)]
    group.run()
    assert group.scheduler.stats.num_preemptions > 0
    assert all(len(group.streams[request]) == 11 for request in requests)
    group.settle()


def test_a_second_turn_finds_its_prefix_and_says_so():
    group = FakeGroup(page_size=4)
    first = group.submit([1] * 10, greedy(6))
    group.run()
    history = [1] * 10 + group.streams[first]
    second = group.submit([*history, 7, 8], greedy(2))
    plan = group.step()
    assert plan.starts == [12]  # 15 of the 16 tokens were computed: 3 whole pages
    group.run()
    assert group.num_cached == {first: 0, second: 12}
    assert group.scheduler.stats.num_cached_tokens == 12


def test_a_step_under_another_relocation_version_is_refused():
    group = FakeGroup()
    group.submit([1], greedy(2))
    plan = group.scheduler.plan(0.0)
    other = RelocationVersion(plan.relocation_version.incarnation, plan.relocation_version.counter - 1)
    with pytest.raises(
        RelocationVersionError, match=r"step 1: found relocation version 11\.0, allowed is 11\.1"
    ):
        group.scheduler.commit(StepOutput(plan.step, other, [1], [None]))


def test_an_idle_scheduler_plans_nothing_but_beats_on_request():
    group = FakeGroup()
    assert group.scheduler.plan(0.0) is None
    plan = group.scheduler.heartbeat()
    assert (plan.step, plan.slots, plan.ops) == (1, [], [])
    assert group.scheduler.commit(StepOutput(1, plan.relocation_version, [], [])) == []


def test_the_load_tells_what_is_left_to_compute_and_what_is_to_be_had():
    group = FakeGroup(max_running=2, max_tokens_per_step=16, num_pages=20)
    for number in range(3):
        group.submit([number] * 20, greedy(4))
    group.step()
    load = group.scheduler.load(0.5, group.now_s)
    assert (load.num_running, load.num_waiting, load.step_s) == (1, 2, 0.5)
    assert load.num_prefill_tokens == 4 + 40
    assert (load.num_pages, load.num_free_pages, load.num_cached_pages) == (20, 15, 0)
    group.run()
    group.settle()
    load = group.scheduler.load(0.5, group.now_s)
    assert load.num_free_pages + load.num_cached_pages == 20 and load.num_cached_pages > 0


def test_the_stats_observe_how_long_the_requests_first_admitted_in_a_step_were_queued():
    group = FakeGroup(max_running=1)
    group.submit([1], greedy(2))
    group.submit([2], greedy(1))
    stats = group.scheduler.stats
    group.step()
    assert group.queue_s == [1.0]
    group.step()
    assert group.queue_s == [1.0]
    group.step()
    assert group.queue_s == [1.0, 3.0]
    assert stats.num_finished == {"length": 2}
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (2, 3)


def test_tokens_outside_the_vocabulary_never_reach_a_plan():
    group = FakeGroup()
    group.submit([0, VOCAB_SIZE - 1], greedy(1))
    with pytest.raises(Exception, match=f"found token id {VOCAB_SIZE}, allowed are 0 to {VOCAB_SIZE - 1}"):
        group.submit([VOCAB_SIZE], greedy(1))
    group.run()
