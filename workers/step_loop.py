"""The step loop of one rank: inbox -> plan -> broadcast -> launch -> collect -> commit -> publish. Ray-free.

Rank 0 runs StepLoop, the others FollowerLoop, each in a thread of its own that owns scheduler, engine, inbox
and group. One trip round the loop is one step of the TP group's ordered log; with a depth of 1 it launches
one step and collects the one before.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from workers.plan import BatchPlan, StepOutput
from workers.protocol import (
    REPLICA_FAILED,
    FinishReason,
    KVEventBatch,
    LoadReport,
    Received,
    RequestId,
    RequestOutput,
    SubmitRequest,
)
from workers.scheduler.admission import RequestRefusedError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
"""Clients ignore load reports older than 1 s; an idle replica sends four of them in that time."""

STALL_S = 0.001
"""Requests that wait for pages (a lagging rank may still read them, a load is under way): looked at again so
soon."""

LOOK_S = 0.001
"""A follower whose step has not ended looks so often whether it has, while no other plan comes."""

END_OF_LOG = b""
"""What rank 0 broadcasts instead of a plan when it stops."""


class StepScheduler(Protocol):
    """What the loop needs of workers.scheduler.scheduler.Scheduler."""

    @property
    def has_requests(self) -> bool:
        """Tell whether requests run or wait."""
        ...

    @property
    def has_moves(self) -> bool:
        """Tell whether the outcome of some SAVE or LOAD is still to be taken in."""
        ...

    def add(self, submit: SubmitRequest, now_s: float) -> None:
        """Queue a request or raise RequestRefusedError."""

    def abort(self, request_id: RequestId, reason: FinishReason) -> RequestOutput | None:
        """End a request; return its last output, None when it is unknown."""
        ...

    def completed(self, step: int) -> None:
        """Free what waited for `step`, the last that every rank has completed."""

    def plan(self, now_s: float) -> BatchPlan | None:
        """Decide the next step; None when there is nothing to run or to tell the ranks, or not yet."""
        ...

    def heartbeat(self) -> BatchPlan:
        """Return a plan without rows, to be run and committed like any other."""
        ...

    def commit(self, output: StepOutput) -> list[RequestOutput]:
        """Book what came of the oldest step that is not committed."""
        ...

    def stepped(self, plan: BatchPlan, duration_s: float, now_s: float) -> None:
        """Note how long a committed step took."""

    def load(self, step_s: float, now_s: float) -> LoadReport:
        """Return the load after the last step."""
        ...


class StepEngine(Protocol):
    """What the loop needs of workers.engine.engine.Engine."""

    def launch(self, plan: BatchPlan) -> None:
        """Apply the plan's ops, begin to run its rows and to sample."""

    @property
    def has_ended(self) -> bool:
        """Tell whether the oldest launched step is over."""
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest launched step and return what came of it."""
        ...


class StepInbox(Protocol):
    """What the loop needs of workers.inbox.Inbox."""

    @property
    def requests(self) -> list[RequestId]:
        """All requests whose end has not been published."""
        ...

    def drain(self, timeout_s: float) -> list[Received]:
        """Return what has arrived; wait up to `timeout_s` for the first message."""
        ...

    def publish(
        self,
        outputs: list[RequestOutput],
        *,
        incarnation: int,
        step: int,
        load: LoadReport,
        kv_events: KVEventBatch | None,
    ) -> None:
        """Send each client its own requests' outputs, and everyone the rest."""


class Board(Protocol):
    """What the loops need of workers.completion_board.CompletionBoard."""

    def publish(self, count: int) -> None:
        """Tell the last step this rank has completed."""

    def minimum(self) -> int:
        """Return the last step that every rank has completed, as far as is known."""
        ...


class PlanChannel(Protocol):
    """What the loops need of workers.parallel.TPGroup."""

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    @property
    def board(self) -> Board:
        """How far each rank has come."""
        ...

    def broadcast_plan(self, plan: bytes) -> None:
        """Rank 0: hand the plan to all other ranks."""

    def has_plan(self, timeout_s: float) -> bool:
        """Other ranks: wait so long for something of rank 0's; tell whether it is there."""
        ...

    def receive_plan(self, timeout_s: float) -> bytes:
        """Other ranks: return the next plan; raise a TPGroupError when rank 0 is silent or gone."""
        ...


class StepRecorder(Protocol):
    """Metrics of rank 0; workers.metrics.LeaderMetrics."""

    def stepped(self, plan: BatchPlan, duration_s: float) -> None:
        """Count one step that was committed."""

    def loaded(self, load: LoadReport) -> None:
        """Take the newest load."""


class _Launched(NamedTuple):
    """A step that is not collected yet, and when it was launched."""

    plan: BatchPlan
    begin_s: float


class StepLoop:
    """Rank 0's loop. What a step brought is published while the device runs the next, where it can run ahead.

    `clock` is monotonic seconds. `depth`: steps that may be under way when another is launched. A step that
    fails ends every request with `error`; `run` then raises.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        engine: StepEngine,
        group: PlanChannel,
        inbox: StepInbox,
        recorder: StepRecorder,
        take_kv_events: Callable[[], KVEventBatch | None],
        *,
        incarnation: int,
        clock: Callable[[], float],
        depth: int = 0,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._group = group
        self._inbox = inbox
        self._recorder = recorder
        self._take_kv_events = take_kv_events
        self._incarnation = incarnation
        self._clock = clock
        self._depth = depth
        self._heartbeat_s = heartbeat_s
        self._launched: deque[_Launched] = deque()
        self._collected_s = clock()
        """When the last step was collected."""
        self._encoder = msgspec.msgpack.Encoder()
        self._stopping = threading.Event()
        self._step = 0
        self._step_s = 0.0
        self._load = LoadReport(0, 0, 0, 0, 0, 0, 0.0)
        self._unsent: list[RequestOutput] | None = None  # of the last step, while it is not published
        self._wait_s = 0.0
        """How long the next turn waits for messages."""
        self._spoke_s = clock()
        self.turned_s = clock()
        """By `clock`, when the last turn began; any thread may read it."""

    def run(self) -> None:
        """Step until `stop`; the requests left then end with `shutdown`. Raise what a step raised."""
        try:
            while not self._stopping.is_set():
                self._turn()
            while self._launched:
                self._collect()
        except Exception as error:  # the loop's top: every client hears of it, then the process dies
            logger.exception("step failed", extra={"step": self._step})
            self._end_all("error", f"the replica failed in a step ({type(error).__name__})")
            raise
        self._end_all("shutdown", None)
        if self._group.size > 1:
            self._group.broadcast_plan(END_OF_LOG)

    def stop(self) -> None:
        """Make `run` return after the steps under way. Any thread may call it."""
        self._stopping.set()

    def _turn(self) -> None:
        """One trip: drain, plan, launch, collect, publish; with nothing to do: wait, or tell we are alive."""
        self.turned_s = self._clock()
        received = self._inbox.drain(self._wait_s)
        if received:
            self._send()  # what they are answered comes behind it
        answers = self._handle(received)
        if answers:
            self._publish(answers)  # queued and refused requests hear of it before the step runs
        self._scheduler.completed(self._group.board.minimum())
        plan = self._scheduler.plan(self._clock())
        if plan is not None:
            self._launch(plan)
        self._send()
        if plan is not None or self._launched:
            self._wait_s = 0.0
            if plan is None or len(self._launched) > self._depth:
                self._collect()
        elif self._scheduler.has_requests or self._scheduler.has_moves:
            self._wait_s = STALL_S
            if self._clock() - self._spoke_s >= self._heartbeat_s:
                self._beat()
        elif self._wait_s < self._heartbeat_s or received:
            self._wait_s = self._heartbeat_s
        else:
            self._beat()

    def _beat(self) -> None:
        if self._group.size > 1:
            self._launch(self._scheduler.heartbeat())
            self._collect()
        else:
            self._publish([])

    def _launch(self, plan: BatchPlan) -> None:
        self._launched.append(_Launched(plan, self._clock()))
        if self._group.size > 1:
            self._group.broadcast_plan(self._encoder.encode(plan))
        self._engine.launch(plan)

    def _collect(self) -> None:
        """Wait for the oldest step and publish what came of it; the device goes on with the next."""
        plan, begin_s = self._launched.popleft()
        self._step = plan.step
        output = self._engine.collect()
        self._group.board.publish(plan.step)
        now_s = self._clock()
        # The device began it once the step before was over.
        duration_s = now_s - max(begin_s, self._collected_s)
        self._collected_s = now_s
        if plan.slots:
            self._step_s = duration_s
        self._unsent = self._scheduler.commit(output)
        self._scheduler.stepped(plan, duration_s, now_s)
        self._recorder.stepped(plan, duration_s)
        if self._launched or not self._depth:
            self._send()  # else the device has nothing to do: what comes next goes first

    def _send(self) -> None:
        """Publish what the last step brought, if that is still to be done."""
        if self._unsent is not None:
            outputs, self._unsent = self._unsent, None
            self._publish(outputs)

    def _handle(self, received: list[Received]) -> list[RequestOutput]:
        """Book what clients asked; return what is to be answered at once."""
        now_s = self._clock()
        answers: list[RequestOutput | None] = []
        for message in received:
            if isinstance(message, SubmitRequest):
                answers.append(self._add(message, now_s))
            else:
                answers.append(self._scheduler.abort(message.request_id, message.finish_reason))
        return [answer for answer in answers if answer is not None]

    def _add(self, submit: SubmitRequest, now_s: float) -> RequestOutput:
        try:
            self._scheduler.add(submit, now_s)
        except RequestRefusedError as error:
            return RequestOutput(
                submit.request_id, [], [], "rejected", error=str(error), error_code=error.code
            )
        return RequestOutput(submit.request_id, [], [])

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        """Give every request its last output without asking the scheduler, which may be what failed."""
        self._tell(self._unsent or [], None)
        code = REPLICA_FAILED if reason == "error" else None
        ends = [RequestOutput(i, [], [], reason, error=error, error_code=code) for i in self._inbox.requests]
        self._tell(ends, None)

    def _publish(self, outputs: list[RequestOutput]) -> None:
        self._spoke_s = self._clock()
        self._load = self._scheduler.load(self._step_s, self._spoke_s)
        self._recorder.loaded(self._load)
        self._tell(outputs, self._take_kv_events())

    def _tell(self, outputs: list[RequestOutput], kv_events: KVEventBatch | None) -> None:
        self._inbox.publish(
            outputs, incarnation=self._incarnation, step=self._step, load=self._load, kv_events=kv_events
        )


class FollowerLoop:
    """The loop of ranks other than 0: apply and run what rank 0 decided, in its order (I1).

    Only rank 0 ends it: a follower that left by itself would fail the steps still to come.
    """

    def __init__(
        self,
        engine: StepEngine,
        group: PlanChannel,
        *,
        silence_s: float,
        depth: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._group = group
        self._silence_s = silence_s
        self._depth = depth
        self._clock = clock
        self._launched: deque[int] = deque()
        self.turned_s = clock()
        """By `clock`, when the last turn began; any thread may read it."""
        self._decoder = msgspec.msgpack.Decoder(BatchPlan)

    def run(self) -> None:
        """Follow until rank 0 ends the log; raise a TPGroupError when it is gone, or silent too long."""
        while (payload := self._next()) != END_OF_LOG:
            plan = self._decoder.decode(payload)
            self._launched.append(plan.step)
            self._engine.launch(plan)
        while self._launched:
            self._collect()

    def _next(self) -> bytes:
        """Return rank 0's next message; meanwhile tell of steps as they end.

        It looks at its own device to tell how far it has come, never to decide anything (I1).
        """
        self.turned_s = self._clock()
        while self._launched:
            if self._engine.has_ended or len(self._launched) > self._depth:
                self._collect()
            elif self._group.has_plan(LOOK_S):
                break
        return self._group.receive_plan(self._silence_s)

    def _collect(self) -> None:
        self._engine.collect()
        self._group.board.publish(self._launched.popleft())
