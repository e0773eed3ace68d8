"""The step loop against fakes: order of a step, abort, drain, failure, followers."""

import threading
from collections import deque

import msgspec
import pytest

from workers.plan import BatchPlan, RelocationVersion, StepOutput
from workers.protocol import (
    AbortRequest,
    LoadReport,
    RequestId,
    RequestOutput,
    SamplingParams,
    SubmitRequest,
)
from workers.step_loop import END_OF_LOG, STALL_S, FollowerLoop, StepLoop

LOAD = LoadReport(0, 0, 0, 8, 8, 0, 0.0)


class FakeScheduler:
    """Every request decodes one token a step until aborted or `max_tokens`."""

    def __init__(self, journal):
        self.journal = journal
        self.running = {}
        self.step = 0
        self.num_stalls = 0
        self.durations = []

    has_moves = False

    @property
    def has_requests(self):
        return bool(self.running)

    def add(self, request, now_s):
        self.running[request.request_id] = request.sampling.max_tokens

    def completed(self, step):
        self.journal.append(("completed", step))

    def abort(self, request_id, reason):
        self.journal.append(("abort", request_id))
        if self.running.pop(request_id, None) is None:
            return None
        return RequestOutput(request_id, [], [], reason)

    def plan(self, now_s):
        if not self.running:
            return None
        if self.num_stalls:
            self.num_stalls -= 1
            return None
        self.step += 1
        self.journal.append(("plan", sorted(self.running)))
        n = len(self.running)
        return BatchPlan(
            self.step, RelocationVersion(7, self.step), [], list(range(n)), [0] * n, [1] * n, [5] * n, [0]
        )

    def commit(self, output):
        outputs = []
        for request_id in list(self.running) if output.token_ids else []:
            self.running[request_id] -= 1
            done = self.running[request_id] == 0
            if done:
                del self.running[request_id]
            outputs.append(RequestOutput(request_id, [5], [], "length" if done else None))
        return outputs

    def heartbeat(self):
        self.step += 1
        return BatchPlan(self.step, RelocationVersion(7, 0), [], [], [], [], [], [])

    def stepped(self, plan, duration_s, now_s):
        self.durations.append((plan.step, duration_s, now_s))

    def load(self, step_s, now_s):
        return LOAD


class FakeEngine:
    def __init__(self, journal, fail_at=None):
        self.journal = journal
        self.fail_at = fail_at
        self.plans = []

    def run(self, plan):
        self.journal.append(("run", plan.step))
        self.plans.append(plan)
        if plan.step == self.fail_at:
            raise RuntimeError("the device fell over")
        return StepOutput(plan.step, plan.relocation_version, [5] * len(plan.slots), [None] * len(plan.slots))


class FakeInbox:
    """Hands out scripted messages, one list a turn; runs `when_empty` once the script is over."""

    def __init__(self, script, when_empty):
        self.script = deque(script)
        self.when_empty = when_empty
        self.open = []
        self.published = []
        self.timeouts = []

    @property
    def requests(self):
        return [RequestId(i) for i in self.open]

    def drain(self, timeout_s):
        self.timeouts.append(timeout_s)
        if not self.script:
            self.when_empty(self)
            return []
        messages = self.script.popleft()
        self.open += [m.request_id for m in messages if isinstance(m, SubmitRequest)]
        return messages

    def publish(self, outputs, *, incarnation, step, load, kv_events):
        self.published.append((step, list(outputs)))
        for output in outputs:
            if output.finish_reason is not None:
                self.open.remove(output.request_id)

    def ends(self):
        return {o.request_id: o for _, outputs in self.published for o in outputs if o.finish_reason}


class FakeBoard:
    """Rank 0's steps count as complete on every rank at once."""

    def __init__(self):
        self.steps = [0]

    def publish(self, count):
        self.steps.append(count)

    def minimum(self):
        return self.steps[-1]


class FakeGroup:
    def __init__(self, journal, plans=(), size=1):
        self.journal = journal
        self.size = size
        self.board = FakeBoard()
        self.sent = []
        self.plans = deque(plans)

    def broadcast_plan(self, plan):
        self.journal.append(("broadcast", len(self.sent)))
        self.sent.append(plan)

    def receive_plan(self, timeout_s):
        if not self.plans:
            raise TimeoutError
        return self.plans.popleft()


class FakeRecorder:
    def __init__(self):
        self.steps = 0

    def stepped(self, plan, duration_s):
        self.steps += 1

    def loaded(self, load):
        pass


def submit(name, max_tokens=3):
    return SubmitRequest(RequestId(name), [1, 2], SamplingParams(max_tokens=max_tokens))


def build(script, *, when_empty=None, fail_at=None, num_ranks=1, clock=None, num_stalls=0):
    journal = []
    loop = None

    def stop_when_idle(inbox):
        if not scheduler.running:
            loop.stop()

    inbox = FakeInbox(script, when_empty or stop_when_idle)
    scheduler = FakeScheduler(journal)
    scheduler.num_stalls = num_stalls
    engine = FakeEngine(journal, fail_at)
    group = FakeGroup(journal, size=num_ranks)
    ticks = iter(range(1_000_000))
    loop = StepLoop(
        scheduler,
        engine,
        group,
        inbox,
        FakeRecorder(),
        lambda: None,
        incarnation=7,
        clock=clock or (lambda: float(next(ticks))),
    )
    return loop, inbox, journal, group, engine


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
    assert kinds[:3] == ["plan", "broadcast", "run"]
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
    assert [entry for entry in journal if entry[0] in ("completed", "run")][:4] == [
        ("completed", 0),
        ("run", 1),
        ("completed", 1),
        ("run", 2),
    ]


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


def test_a_failed_step_ends_every_request_with_a_documented_error():
    loop, inbox, _, _, _ = build([[submit("a", 9), submit("b", 9)]], fail_at=2)
    with pytest.raises(RuntimeError, match="fell over"):
        loop.run()
    for name in ("a", "b"):
        end = inbox.ends()[name]
        assert (end.finish_reason, end.error_code) == ("error", "replica_failed")
        assert "RuntimeError" in end.error
        assert "fell over" not in end.error  # the cause is for the log, not for clients


def test_a_follower_runs_the_log_in_order_and_publishes_each_step():
    def plan(step, slots):
        n = len(slots)
        return msgspec.msgpack.encode(
            BatchPlan(step, RelocationVersion(7, step), [], slots, [0] * n, [1] * n, [5] * n, [])
        )

    journal = []
    engine = FakeEngine(journal)
    group = FakeGroup(journal, [plan(1, [0]), plan(2, []), plan(3, [0, 1]), END_OF_LOG], size=2)
    FollowerLoop(engine, group, silence_s=1.0).run()
    assert [p.step for p in engine.plans] == [1, 2, 3]
    assert group.board.steps == [0, 1, 2, 3]


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
