"""The step loop of one rank: inbox -> plan -> broadcast -> run -> commit -> publish. Ray-free.

Rank 0 runs StepLoop, the others FollowerLoop, each in a thread of its own that owns scheduler, engine, inbox
and group. One trip round the loop is one step of the TP group's ordered log.
"""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from workers.plan import BatchPlan, RelocationVersion, StepOutput
from workers.protocol import (
    AbortRequest,
    Drain,
    FinishReason,
    KVEventBatch,
    LoadReport,
    RequestId,
    RequestOutput,
    SubmitRequest,
)

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
"""Clients ignore load reports older than 1 s; an idle replica sends four of them in that time."""

END_OF_LOG = b""
"""What rank 0 broadcasts instead of a plan when it stops."""

Received = SubmitRequest | AbortRequest | Drain

REPLICA_FAILED = "replica_failed"
"""`error_code` of requests that a failed step took down."""


class StepScheduler(Protocol):
    """What the loop needs of workers.scheduler.scheduler.Scheduler."""

    def add(self, request: SubmitRequest, now_s: float) -> RequestOutput:
        """Queue or reject; the answer goes to the client as it is."""
        ...

    def abort(self, request_id: RequestId, reason: FinishReason) -> RequestOutput | None:
        """End a request; return its last output, None when it is unknown."""
        ...

    def plan(self, now_s: float) -> BatchPlan | None:
        """Decide the next step; None when nothing is to be done."""
        ...

    def commit(self, output: StepOutput, now_s: float) -> list[RequestOutput]:
        """Book what came of the step."""
        ...

    def load(self) -> LoadReport:
        """Return the load after the last step."""
        ...

    def take_kv_events(self) -> KVEventBatch | None:
        """Return the prefix tree's news since the last call."""
        ...


class StepEngine(Protocol):
    """What the loop needs of workers.engine.engine.Engine."""

    def run(self, plan: BatchPlan) -> StepOutput:
        """Apply the plan's ops, run its rows, sample."""
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


class PlanChannel(Protocol):
    """What the loops need of workers.parallel.TPGroup."""

    def broadcast_plan(self, plan: bytes) -> None:
        """Rank 0: hand the plan to all other ranks."""

    def receive_plan(self, timeout_s: float) -> bytes:
        """Other ranks: return the next plan; raise TimeoutError when rank 0 is silent."""
        ...


class StepRecorder(Protocol):
    """Metrics of a rank; workers.metrics.WorkerMetrics."""

    def stepped(self, plan: BatchPlan, duration_s: float) -> None:
        """Count one step that ran."""

    def loaded(self, load: LoadReport) -> None:
        """Take the newest load."""


class StepLoop:
    """Rank 0's loop.

    `clock` is monotonic seconds. A step that fails ends every request with `error`; `run` then raises.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        engine: StepEngine,
        group: PlanChannel,
        inbox: StepInbox,
        recorder: StepRecorder,
        *,
        incarnation: int,
        num_ranks: int = 1,
        clock: Callable[[], float],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._group = group
        self._inbox = inbox
        self._recorder = recorder
        self._relocation_version = RelocationVersion(incarnation, 0)
        self._num_ranks = num_ranks
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._encoder = msgspec.msgpack.Encoder()
        self._stopping = threading.Event()
        self._is_draining = False
        self._deadline_s: float | None = None
        self._step = 0
        self._step_s = 0.0
        self._load = LoadReport(0, 0, 0, 0, 0, 0, 0.0)
        self._is_idle = False

    def run(self) -> None:
        """Step until `stop`; the requests left then end with `shutdown`. Raise what a step raised."""
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:  # the loop's top: every client hears of it, then the process dies
            logger.exception("step failed", extra={"step": self._step})
            self._end_all(
                "error", f"the replica failed in a step ({type(error).__name__}); send the request again"
            )
            raise
        self._end_all("shutdown", None)
        if self._num_ranks > 1:
            self._group.broadcast_plan(END_OF_LOG)

    def stop(self) -> None:
        """Make `run` return after the current step. Any thread may call it."""
        self._stopping.set()

    def _turn(self) -> None:
        """One trip: drain, plan, run, publish; idle: wait for messages, or tell everyone we are alive."""
        received = self._inbox.drain(self._heartbeat_s if self._is_idle else 0.0)
        answers = self._handle(received)
        if answers:
            self._publish(answers)  # queued and refused requests hear of it before the step runs
        plan = self._scheduler.plan(self._clock())
        if plan is None:
            if self._is_idle and not received:
                self._beat()
            self._is_idle = True
            return
        self._is_idle = False
        self._step, self._relocation_version = plan.step, plan.relocation_version
        begin_s = self._clock()
        if self._num_ranks > 1:
            self._group.broadcast_plan(self._encoder.encode(plan))
        output = self._engine.run(plan)
        now_s = self._clock()
        self._step_s = now_s - begin_s
        self._publish(self._scheduler.commit(output, now_s))
        self._recorder.stepped(plan, self._step_s)

    def _handle(self, received: list[Received]) -> list[RequestOutput]:
        """Book what clients asked; return what is to be answered at once."""
        now_s = self._clock()
        answers: list[RequestOutput | None] = []
        for message in received:
            if isinstance(message, SubmitRequest):
                if self._is_draining:
                    answers.append(_refused(message.request_id))
                else:
                    answers.append(self._scheduler.add(message, now_s))
            elif isinstance(message, AbortRequest):
                answers.append(self._scheduler.abort(message.request_id, message.finish_reason))
            else:
                self._is_draining = True
                self._deadline_s = now_s + message.deadline_s
        if self._deadline_s is not None and now_s >= self._deadline_s:
            answers.extend(
                self._scheduler.abort(request_id, "shutdown") for request_id in self._inbox.requests
            )
        return [answer for answer in answers if answer is not None]

    def _beat(self) -> None:
        """Nothing to do: clients get a load report, followers an empty plan that changes nothing."""
        self._publish([])
        if self._num_ranks > 1:
            beat = BatchPlan(self._step, self._relocation_version, [], [], [], [], [], [])
            self._group.broadcast_plan(self._encoder.encode(beat))

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        """Give every request its last output without asking the scheduler, which may be what failed."""
        code = REPLICA_FAILED if reason == "error" else None
        self._inbox.publish(
            [RequestOutput(i, [], [], reason, error=error, error_code=code) for i in self._inbox.requests],
            incarnation=self._relocation_version.incarnation,
            step=self._step,
            load=self._load,
            kv_events=None,
        )

    def _publish(self, outputs: list[RequestOutput]) -> None:
        self._load = msgspec.structs.replace(self._scheduler.load(), step_s=self._step_s)
        self._recorder.loaded(self._load)
        self._inbox.publish(
            outputs,
            incarnation=self._relocation_version.incarnation,
            step=self._step,
            load=self._load,
            kv_events=self._scheduler.take_kv_events(),
        )


class FollowerLoop:
    """The loop of ranks other than 0: apply and run what rank 0 decided, in its order (I1)."""

    def __init__(self, engine: StepEngine, group: PlanChannel, *, silence_s: float) -> None:
        self._engine = engine
        self._group = group
        self._silence_s = silence_s
        self._decoder = msgspec.msgpack.Decoder(BatchPlan)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Follow until the log ends or `stop`; raise TimeoutError when rank 0 is silent for `silence_s`."""
        while not self._stopping.is_set():
            payload = self._group.receive_plan(self._silence_s)
            if payload == END_OF_LOG:
                return
            plan = self._decoder.decode(payload)
            if plan.slots or plan.ops:
                self._engine.run(plan)

    def stop(self) -> None:
        """Make `run` return after the next plan. Any thread may call it."""
        self._stopping.set()


def _refused(request_id: RequestId) -> RequestOutput:
    return RequestOutput(
        request_id, [], [], "rejected",
        error="the replica is draining and takes no new requests; send it again later", error_code="draining",
    )  # fmt: skip
