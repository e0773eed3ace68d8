"""The step loop against fakes: order of a step, abort, drain, failure, followers."""

import threading

import msgspec
import pytest

from tests.unit.step_loop_fakes import FakeEngine, FakeGroup, build, submit
from workers.plan import BatchPlan, RelocationVersion
from workers.protocol import AbortRequest, RequestId
from workers.step_loop import END_OF_LOG, STALL_S, FollowerLoop


def test_a_request_is_acknowledged_before_its_first_step_and_ends_once():
    loop, inbox, _, _, _ = build([[submit("a")]])
    loop.run()
    of_a = [o for _, outputs in inbox.published for o in outputs]
    assert [o.token_ids for o in of_a] == [[], [5], [5], [5]]
    assert [o.finish_reason for o in of_a] == [None, None, None, "length"]


def test_an_abort_takes_effect_before_the_next_step():
    loop, inbox, journal, _, _ = build([[submit("a", 9), submit("b", 4)], [AbortRequest(RequestId("a"))]])
    loop.run()
    plans = [names for kind, names in journal if kind == "plan"]
    assert plans[0] == ["a", "b"]
    assert all(names == ["b"] for names in plans[1:])
    assert inbox.ends()["a"].finish_reason == "abort"
    assert inbox.ends()["b"].finish_reason == "length"


def test_followers_get_the_plan_before_rank_0_runs_it():
    loop, _, journal, group, engine = build([[submit("a")]], num_ranks=2)
    loop.run()
    kinds = [kind for kind, _ in journal if kind != "completed"]
    assert kinds[:4] == ["plan", "broadcast", "launch", "collect"]
    decoded = [msgspec.msgpack.decode(p, type=BatchPlan) for p in group.sent if p != END_OF_LOG]
    assert decoded == engine.plans
    assert group.sent[-1] == END_OF_LOG


def test_the_scheduler_hears_how_long_each_step_took():
    loop, *_ = build([[submit("a")]])
    loop.run()
    durations = loop._scheduler.durations
    assert [step for step, *_ in durations] == [1, 2, 3]
    assert all(0 < duration_s < now_s for _, duration_s, now_s in durations)


def test_completed_steps_are_told_before_the_next_plan():
    loop, _, journal, _, _ = build([[submit("a")]])
    loop.run()
    assert [entry for entry in journal if entry[0] in ("completed", "launch")][:4] == [
        ("completed", 0),
        ("launch", 1),
        ("completed", 1),
        ("launch", 2),
    ]


def test_a_step_ahead_is_launched_before_the_one_before_is_collected():
    loop, inbox, journal, _, _ = build([[submit("a")]], depth=1)
    loop.run()
    steps = [entry for entry in journal if entry[0] in ("launch", "collect", "completed")]
    assert steps[:8] == [
        ("completed", 0),
        ("launch", 1),
        ("completed", 0),
        ("launch", 2),
        ("collect", 1),
        ("completed", 1),
        ("launch", 3),
        ("collect", 2),
    ]
    assert [step for step, outputs in inbox.published if outputs and outputs[0].token_ids] == [1, 2, 3]


def test_with_nothing_to_plan_what_is_under_way_is_collected_at_once():
    """Nobody waits for a message, or for a plan that will not come, with tokens on the device."""
    loop, inbox, journal, _, _ = build([[submit("a", 1)]], depth=1, num_stalls=0)
    loop._scheduler.plan = once(loop._scheduler.plan)
    loop.run()
    steps = [entry for entry in journal if entry[0] in ("launch", "collect")]
    assert steps == [("launch", 1), ("collect", 1)]
    assert inbox.timeouts[:2] == [0.0, 0.0]
    assert inbox.ends()["a"].finish_reason == "length"


def test_a_step_that_others_wait_for_is_published_once_the_next_is_launched():
    """Nothing is planned ahead of a step that speculates: the device waits for what follows it."""
    loop, inbox, journal, _, _ = build([[submit("a")], []], depth=1, num_stalls=0)
    plan, publish = loop._scheduler.plan, inbox.publish

    def planned(now_s):
        return None if loop._launched else plan(now_s)

    def published(outputs, **fields):
        if outputs and outputs[0].token_ids:
            journal.append(("publish", fields["step"]))
        publish(outputs, **fields)

    loop._scheduler.plan, inbox.publish = planned, published
    loop.run()
    assert [entry for entry in journal if entry[0] in ("launch", "collect", "publish")] == [
        ("launch", 1),
        ("collect", 1),
        ("launch", 2),
        ("publish", 1),
        ("collect", 2),
        ("launch", 3),
        ("publish", 2),
        ("collect", 3),
        ("publish", 3),
    ]
    assert inbox.ends()["a"].finish_reason == "length"


def test_what_a_step_brought_comes_before_what_is_asked_then_is_answered():
    script = [[submit("a", 9)], [], [AbortRequest(RequestId("a"))]]
    loop, inbox, _, _, _ = build(script, depth=1, num_stalls=0)
    plan = loop._scheduler.plan
    loop._scheduler.plan = lambda now_s: None if loop._launched else plan(now_s)
    loop.run()
    of_a = [output for _, outputs in inbox.published for output in outputs]
    assert [(output.token_ids, output.finish_reason) for output in of_a][-2:] == [([5], None), ([], "abort")]


def once(plan):
    """Plan a single step."""
    plans = []

    def planned(now_s):
        if plans:
            return None
        plans.append(plan(now_s))
        return plans[-1]

    return planned


def test_a_step_takes_the_time_from_the_end_of_the_one_before():
    """With a step ahead the device begins it later than it was launched."""
    loop, *_ = build([[submit("a", 6)]], depth=1)
    loop.run()
    durations = [duration_s for _, duration_s, _ in loop._scheduler.durations]
    begins = [now_s - duration_s for _, duration_s, now_s in loop._scheduler.durations]
    ends = [now_s for *_, now_s in loop._scheduler.durations]
    assert begins[1:] == ends[:-1]
    assert all(duration_s > 0 for duration_s in durations)


def test_stop_waits_for_the_steps_under_way_and_publishes_them():
    loop, inbox, journal, _, _ = build(
        [[submit("a", 500)], []], when_empty=lambda inbox: loop.stop(), depth=1
    )
    loop.run()
    assert journal[-2:] == [("collect", 2), ("collect", 3)]
    of_a = [output for _, outputs in inbox.published for output in outputs]
    assert [output.token_ids for output in of_a] == [[], [5], [5], [5], []]
    assert of_a[-1].finish_reason == "shutdown"


def test_an_idle_replica_waits_for_messages_and_keeps_telling_its_load():
    turns = []

    def stop_after_five(inbox):
        turns.append(None)
        if len(turns) == 5:
            loop.stop()

    loop, inbox, _, group, _ = build([], when_empty=stop_after_five, num_ranks=2)
    loop.run()
    assert inbox.timeouts[0] == 0.0
    assert set(inbox.timeouts[1:]) == {0.25}
    assert len(inbox.published) >= 3
    beats = [msgspec.msgpack.decode(p, type=BatchPlan) for p in group.sent if p != END_OF_LOG]
    assert beats
    assert not any(b.slots or b.ops for b in beats)


def test_requests_that_wait_for_a_lagging_rank_are_looked_at_again_at_once():
    loop, inbox, _, _, _ = build([[submit("a", 1)]], num_ranks=2, clock=lambda: 0.0, num_stalls=4)
    loop.run()
    assert inbox.timeouts[:6] == [0.0, STALL_S, STALL_S, STALL_S, STALL_S, 0.0]
    assert inbox.ends()["a"].finish_reason == "length"


def test_a_stalled_replica_keeps_telling_its_load():
    loop, _, _, group, _ = build([[submit("a", 1)]], num_ranks=2, num_stalls=4)  # each look at the clock: 1 s
    loop.run()
    sent = [msgspec.msgpack.decode(p, type=BatchPlan) for p in group.sent if p != END_OF_LOG]
    assert [bool(plan.slots) for plan in sent] == [False] * 4 + [True]


def test_a_turn_leaves_its_time():
    now_s = 0.0

    def clock():
        return now_s

    def work(inbox):
        nonlocal now_s
        seen.append(loop.turned_s)
        now_s += 7.0
        if len(seen) == 3:
            loop.stop()

    seen = []
    loop, _, _, _, _ = build([], when_empty=work, clock=clock)
    loop.run()
    assert seen == [0.0, 7.0, 14.0]


def test_stop_ends_what_runs_with_shutdown():
    loop, inbox, _, _, _ = build([[submit("a", 500)]], when_empty=lambda inbox: loop.stop())
    loop.run()
    assert inbox.ends()["a"].finish_reason == "shutdown"


@pytest.mark.parametrize("fails_late", [False, True], ids=["launched", "collected"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_step_ends_every_request_with_a_documented_error(depth, fails_late):
    script = [[submit("a", 9), submit("b", 9)]]
    loop, inbox, _, _, _ = build(script, fail_at=2, fails_late=fails_late, depth=depth)
    with pytest.raises(RuntimeError, match="fell over"):
        loop.run()
    for name in ("a", "b"):
        end = inbox.ends()[name]
        assert (end.finish_reason, end.error_code) == ("error", "replica_failed")
        assert "RuntimeError" in end.error
        assert "again" not in end.error  # the API says that, once
        assert "fell over" not in end.error  # the cause is for the log, not for clients


def test_a_scheduler_that_fails_is_not_asked_again_and_what_it_brought_is_told():
    """While the last step is not published: nothing is planned ahead of a step that speculates."""
    loop, inbox, _, _, _ = build([[submit("a", 9), submit("b", 1)]], depth=1)
    plan = loop._scheduler.plan

    def broken(*_):
        raise RuntimeError("its books are torn")

    def planned(now_s):
        if loop._unsent is not None:
            loop._scheduler.load = broken
            broken()
        return None if loop._launched else plan(now_s)

    loop._scheduler.plan = planned
    with pytest.raises(RuntimeError, match="its books are torn"):
        loop.run()
    told = [output for _, outputs in inbox.published for output in outputs if output.token_ids]
    assert [(output.request_id, output.finish_reason) for output in told] == [("a", None), ("b", "length")]
    ends = inbox.ends()
    assert {name: end.finish_reason for name, end in ends.items()} == {"a": "error", "b": "length"}


def encoded(step, slots):
    n = len(slots)
    return msgspec.msgpack.encode(
        BatchPlan(step, RelocationVersion(7, step), [], slots, [0] * n, [1] * n, [5] * n, [])
    )


def test_a_follower_runs_the_log_in_order_and_publishes_each_step():
    journal = []
    engine = FakeEngine(journal)
    group = FakeGroup(journal, [encoded(1, [0]), encoded(2, []), encoded(3, [0, 1]), END_OF_LOG], size=2)
    FollowerLoop(engine, group, silence_s=1.0).run()
    assert [p.step for p in engine.plans] == [1, 2, 3]
    assert group.board.steps == [0, 1, 2, 3]


def test_a_follower_launches_the_next_step_while_one_runs_and_tells_of_each_as_it_ends():
    journal = []
    engine = FakeEngine(journal)
    group = FakeGroup(journal, [encoded(step, [0]) for step in (1, 2, 3)] + [END_OF_LOG], size=2)
    group.num_early = 2
    FollowerLoop(engine, group, silence_s=1.0, depth=1).run()
    steps = [entry for entry in journal if entry[0] in ("launch", "collect")]
    assert steps == [
        ("launch", 1),
        ("launch", 2),
        ("collect", 1),  # no third one before that
        ("launch", 3),
        ("collect", 2),
        ("collect", 3),  # though no plan came
    ]
    assert group.board.steps == [0, 1, 2, 3]
    assert not group.num_early


def test_a_follower_gives_up_on_a_silent_rank_0():
    with pytest.raises(TimeoutError):
        FollowerLoop(FakeEngine([]), FakeGroup([]), silence_s=0.01).run()


def test_stop_may_come_from_another_thread():
    loop, inbox, _, _, _ = build([[submit("a", 10**9)]], when_empty=lambda inbox: None)
    thread = threading.Thread(target=loop.run)
    thread.start()
    loop.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert set(inbox.ends()) <= {"a"}
