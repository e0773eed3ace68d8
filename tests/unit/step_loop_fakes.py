"""A step loop over fakes: scheduler, engine, inbox, board, group and recorder, which keep a journal."""

from collections import deque

from workers.plan import BatchPlan, RelocationVersion, StepOutput
from workers.protocol import LoadReport, RequestId, RequestOutput, SamplingParams, SubmitRequest
from workers.step_loop import StepLoop

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
    """Its device has ended a step at the third look at it."""

    def __init__(self, journal, fail_at=None, fails_late=False):
        self.journal = journal
        self.fail_at = fail_at
        self.fails_late = fails_late
        self.plans = []
        self.launched = deque()
        self.num_looks = 0

    def launch(self, plan):
        self.journal.append(("launch", plan.step))
        self.plans.append(plan)
        self.launched.append(plan)
        self.fail(plan.step, is_late=False)

    def fail(self, step, is_late):
        if step == self.fail_at and is_late == self.fails_late:
            raise RuntimeError("the device fell over")

    @property
    def has_ended(self):
        self.num_looks += 1
        return self.num_looks == 3

    def collect(self):
        self.num_looks = 0
        plan = self.launched.popleft()
        self.journal.append(("collect", plan.step))
        self.fail(plan.step, is_late=True)
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
        self.num_early = 0
        """Plans that come while the step before runs."""

    def broadcast_plan(self, plan):
        self.journal.append(("broadcast", len(self.sent)))
        self.sent.append(plan)

    def has_plan(self, timeout_s):
        if not self.num_early:
            return False
        self.num_early -= 1
        return True

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


def build(
    script,
    *,
    when_empty=None,
    fail_at=None,
    fails_late=False,
    num_ranks=1,
    clock=None,
    num_stalls=0,
    depth=0,
):
    journal = []
    loop = None

    def stop_when_idle(inbox):
        if not scheduler.running:
            loop.stop()

    inbox = FakeInbox(script, when_empty or stop_when_idle)
    scheduler = FakeScheduler(journal)
    scheduler.num_stalls = num_stalls
    engine = FakeEngine(journal, fail_at, fails_late)
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
        depth=depth,
    )
    return loop, inbox, journal, group, engine
