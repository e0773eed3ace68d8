from tests.property.fake_group import FakeGroup
from workers.plan import CloseSlot, OpenSlot
from workers.protocol import RequestId, SamplingParams


def endless(max_tokens: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def slots_opened(plan) -> list[int]:
    return [op.slot for op in plan.ops if isinstance(op, OpenSlot)]


def slots_closed(plan) -> list[int]:
    return [op.slot for op in plan.ops if isinstance(op, CloseSlot)]


def test_when_pages_run_out_the_last_in_order_gives_way_and_every_stream_is_whole():
    group = FakeGroup(num_pages=6, page_size=2, max_context_len=12, prefix_caching=False)
    requests = [group.submit([number], endless()) for number in range(3)]
    group.run()
    assert group.scheduler.stats.num_preemptions > 0
    assert list(group.reasons) == requests  # the oldest first
    assert all(len(group.streams[request]) == 11 for request in requests)
    group.settle()


def test_a_preempted_request_keeps_its_tokens_and_its_seed():
    group = FakeGroup(num_pages=6, page_size=2, max_context_len=12, prefix_caching=False)
    for number in range(2):
        group.submit([number], endless())
    opened: list[OpenSlot] = []
    while group.scheduler.has_requests:
        plan = group.step()
        opened += [op for op in plan.ops if isinstance(op, OpenSlot)]
    first, second, resumed = opened
    assert resumed.seed == second.seed != first.seed
    assert resumed.prompt_len == 1
    assert resumed.token_ids == [1, *group.streams[RequestId("r1")][: len(resumed.token_ids) - 1]]
    assert len(resumed.token_ids) > 3


def test_a_resumed_request_finds_what_it_computed_and_reports_its_first_hit():
    group = FakeGroup(num_pages=8, page_size=2, max_context_len=12)
    for number in range(2):
        group.submit([number] * 3, endless())
    starts = []
    while group.scheduler.has_requests:
        plan = group.step()
        starts += [
            plan.starts[plan.slots.index(op.slot)]
            for op in plan.ops
            if isinstance(op, OpenSlot) and op.slot in plan.slots
        ]
    assert group.scheduler.stats.num_preemptions > 0
    assert starts[2] > 0  # whole pages that nobody needed meanwhile
    assert group.num_cached == {"r0": 0, "r1": 0}


def test_preemption_takes_the_lowest_priority_and_never_one_ahead():
    group = FakeGroup(num_pages=6, page_size=2, max_context_len=12, prefix_caching=False)
    low = group.submit([1], endless(), priority=2)
    group.step()
    high = group.submit([2], endless(), priority=0)
    middle = group.submit([3], endless(), priority=1)
    group.run()
    assert group.scheduler.stats.num_preemptions > 0
    assert list(group.reasons) == [high, middle, low]


def test_a_request_of_higher_priority_takes_a_slot_at_once():
    group = FakeGroup(max_running=1)
    low = group.submit([1], endless(20), priority=1)
    group.step()
    high = group.submit([2], endless(3), priority=0)
    plan = group.step()
    assert slots_closed(plan) == slots_opened(plan) == [0]
    group.run()
    assert list(group.reasons) == [high, low]
    assert len(group.streams[low]) == 20


def test_an_equal_priority_never_takes_a_slot():
    group = FakeGroup(max_running=1)
    first = group.submit([1], endless(10))
    group.step()
    second = group.submit([2], endless(1))
    group.run()
    assert list(group.reasons) == [first, second]
    assert group.scheduler.stats.num_preemptions == 0


def test_lower_priorities_are_not_preempted_for_nothing():
    group = FakeGroup(
        num_pages=12, page_size=2, max_context_len=24, prefix_caching=False, max_tokens_per_step=64
    )
    group.submit([1] * 15, endless(8), priority=0)  # 8 of 12 pages
    group.submit([2] * 2, endless(8), priority=1)
    group.step()
    group.submit([3] * 18, endless(2), priority=0)  # fits only when the first is gone
    group.step()
    assert group.scheduler.num_running == 2 and group.scheduler.stats.num_preemptions == 0
    group.run()


def test_a_request_preempted_and_readmitted_while_planning_has_one_row():
    group = FakeGroup(num_pages=45, page_size=1, max_context_len=44, max_tokens_per_step=16)
    group.submit([1] * 15, endless(4))
    behind = group.submit([1] * 15 + [2] * 10, endless(4))
    group.step()
    group.submit([9] * 6, endless(2), priority=-1)  # 8 pages with the spare ones; 6 are free
    plan = group.step()
    # It comes back at once: the pages that it has in common with the first are computed by now.
    assert len(slots_closed(plan)) == 1 and len(slots_opened(plan)) == 2
    assert sorted(plan.lens) == [1, 6, 9] and sum(plan.lens) == 16
    group.run()
    assert group.reasons[behind] == "length"


def test_the_rows_of_requests_preempted_while_planning_are_dropped_from_the_step():
    group = FakeGroup(
        num_pages=8, page_size=2, max_context_len=16, max_tokens_per_step=13, prefix_caching=False
    )
    for number in range(2):
        group.submit([number] * 4, endless(), priority=1)
    group.step()
    high = group.submit([9] * 13, endless(), priority=0)
    plan = group.step()
    assert len(slots_closed(plan)) == 2
    assert plan.lens == [13] and plan.sampled == [0]
    group.run()
    assert next(iter(group.reasons)) == high


def test_admission_leaves_a_page_for_each_running_request_lest_it_be_preempted_at_once():
    group = FakeGroup(num_pages=8, page_size=2, max_context_len=16, prefix_caching=False)
    group.submit([1] * 8, endless(6))  # 4 pages now, 3 more later
    group.step()
    group.submit([2] * 6, endless(2))  # the 3 free pages would do
    group.step()
    assert group.scheduler.num_running == 1 and group.scheduler.num_waiting == 1
    group.run()
    assert group.scheduler.stats.num_preemptions == 0


def test_a_request_waits_for_quiescing_pages_instead_of_preempting_for_them():
    group = FakeGroup(num_pages=8, page_size=2, max_context_len=12, num_ranks=2, prefix_caching=False)
    short = group.submit([1] * 6, endless(2))  # 4 pages in the end
    older, younger = group.submit([2] * 3, endless(5)), group.submit([3], endless(5))
    while short not in group.reasons:
        group.step(lags=(0, 9))
    waiting = group.submit([4], endless(1))
    for _ in range(4):
        plan = group.step(lags=(0, 9))
    stats = group.cache.stats()
    assert (stats.num_free_pages, stats.num_quiescing_pages) == (0, 4)
    # Both lack a page, and nobody is let in ahead of them.
    assert plan is None and group.scheduler.num_running == 2
    assert group.scheduler.stats.num_preemptions == 0
    group.run()
    assert group.reasons.keys() == {short, older, younger, waiting}
    assert group.scheduler.stats.num_preemptions == 0


def test_pages_that_come_free_are_for_the_first_who_lacks_them():
    group = FakeGroup(num_pages=8, page_size=2, max_context_len=16, num_ranks=2, prefix_caching=False)
    group.submit([1] * 6, endless(1), priority=0)  # 3 pages that quiesce after the first step
    low = group.submit([2] * 2, endless(8), priority=1)
    for _ in range(2):
        group.step(lags=(0, 9))
    high = group.submit([3] * 9, endless(1), priority=0)  # 5 pages: 3 are free, 3 to come
    group.step(lags=(0, 9))
    plan = group.step(lags=(0, 9))
    assert plan.slots == [] and group.cache.stats().num_free_pages == 3  # low lacks one; they are not its
    group.run()
    assert list(group.reasons)[1:] == [high, low]
    assert group.scheduler.stats.num_preemptions == 0


def test_nobody_is_preempted_for_pages_that_the_one_in_need_would_share_with_it():
    group = FakeGroup(num_pages=7, page_size=2, max_context_len=14, max_tokens_per_step=32)
    group.submit([9], endless(4), priority=0)
    group.submit([1] * 7, endless(3), priority=2)  # 4 pages, 3 of them complete
    group.step()
    # 3 shared pages and 3 more: the low one's fourth and 2 free ones would leave no spare page.
    group.submit([1] * 6 + [2] * 6, endless(1), priority=1)
    group.step()
    assert group.scheduler.num_running == 2 and group.scheduler.stats.num_preemptions == 0
    group.run()


def test_an_abort_ends_a_request_wherever_it_stands():
    group = FakeGroup(max_running=2, max_tokens_per_step=8)
    prefilling = group.submit([1] * 30, endless())
    waiting = [group.submit([number], endless()) for number in (2, 3, 4)]
    group.step()
    for request in (prefilling, waiting[0]):
        group.abort(request)
        group.check()
    group.step()
    group.abort(waiting[1])  # running now
    group.abort(waiting[2])
    group.abort(waiting[2])  # a second time: nothing
    group.settle()
    assert set(group.reasons.values()) == {"abort"}


def test_what_a_step_in_flight_brings_for_an_aborted_request_is_dropped():
    group = FakeGroup()
    gone, stays = group.submit([1] * 5, endless()), group.submit([2] * 5, endless(4))
    group.step()
    before = list(group.streams[gone])
    group.step(abort_in_flight=gone)
    assert group.streams[gone] == before
    group.run()
    assert group.reasons == {gone: "abort", stays: "length"}
    group.settle()


def test_the_slot_of_a_request_aborted_in_flight_can_be_taken_in_the_next_step():
    group = FakeGroup(max_running=1)
    gone = group.submit([1] * 5, endless())
    follower = group.submit([2] * 5, endless(3))
    group.step(abort_in_flight=gone)
    plan = group.step()
    assert slots_closed(plan) == slots_opened(plan) == [0]
    group.run()
    assert len(group.streams[follower]) == 3


def test_an_abort_says_the_reason_it_was_given():
    group = FakeGroup()
    request = group.submit([1], endless())
    group.step()
    output = group.scheduler.abort(request, "stop")
    assert output is not None and output.finish_reason == "stop" and output.token_ids == []
    assert group.scheduler.abort(request, "stop") is None
    assert group.scheduler.stats.num_finished == {"stop": 1}
