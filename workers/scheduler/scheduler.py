"""Scheduler: decides which tokens of which requests the next step computes.

Rank 0's step loop owns it and drives it from one thread: add / abort, plan, run the engine, commit.
Plain ints and lists; no torch, no clock and no randomness of its own.
"""

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter
from random import Random

from workers.config import WorkerConfig
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.page_pool import Safety
from workers.plan import BatchPlan, OpenSlot, RelocationVersionError, StepOutput
from workers.protocol import (
    FinishReason,
    LoadReport,
    RequestId,
    RequestOutput,
    SubmitRequest,
    TokenLogprobs,
)
from workers.scheduler.admission import Admission, QueueFullError, RequestRefusedError, WaitingQueue
from workers.scheduler.request import Request
from workers.scheduler.stats import SchedulerStats, load_report
from workers.scheduler.step import Step, assemble

_order = attrgetter("order")


class Scheduler:
    """Continuous batching over one KVCacheManager.

    Each step: every decoding request's next token, then prefill chunks and admissions in order, within
    `max_tokens_per_step`. Order is (priority, arrival). A request short of pages takes them from the last in
    order, never from one ahead of it; so the first in order always progresses and nothing fails for lack of
    pages. A preempted request keeps its tokens and computes them again, or finds them in the cache.
    """

    def __init__(
        self,
        config: WorkerConfig,
        cache: KVCacheManager,
        *,
        end_token_ids: list[int],
        max_context_len: int,
        vocab_size: int,
        seeds: Random,
        lookahead: int = 0,
        safety: Safety | None = None,
    ) -> None:
        """`seeds` gives seeds to requests that bring none. `lookahead` is how many tokens a row may grow by
        in steps still in flight when its pages are reserved: 0 as long as each step is committed before the
        next is planned."""
        self.max_context_len = min(max_context_len, cache.num_pages * cache.page_size)
        """What one request may hold: the model's context, as far as the pool can hold it."""
        self.stats = SchedulerStats()
        self._config = config
        self._cache = cache
        self._admission = Admission(
            cache,
            end_token_ids=end_token_ids,
            max_context_len=self.max_context_len,
            vocab_size=vocab_size,
            seeds=seeds,
        )
        self._lookahead = lookahead
        self._safety = safety or Safety()
        # Never more requests than tokens in a step, so that each of them can have one.
        max_running = min(config.max_running_requests, config.max_tokens_per_step)
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._max_requests = max_running + config.max_waiting_requests
        self._requests: dict[RequestId, Request] = {}
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # by order
        self._num_steps = 0
        self._in_flight: Step | None = None
        self._budget = 0  # tokens left in the step being planned

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def has_requests(self) -> bool:
        """Tell whether any request is unfinished."""
        return bool(self._requests)

    def add(self, submit: SubmitRequest, now_s: float) -> None:
        """Queue a request, or raise a RequestRefusedError that says what was found and what is allowed.

        Requests that a free slot awaits do not count against `max_waiting_requests`.
        """
        try:
            self._check_room(submit.request_id)
            request = self._admission.accept(submit, now_s)
        except RequestRefusedError as error:
            self.stats.num_refused[error.code] += 1
            raise
        self._requests[request.request_id] = request
        request.prefetch = self._cache.prefetch(request.tokens, submit.hints, now_s)
        self._waiting.push(request)
        self.stats.num_prompt_tokens += request.prompt_len

    def abort(self, request_id: RequestId, reason: FinishReason = "abort") -> RequestOutput | None:
        """End a request wherever it stands and return its last output; None if it is unknown or has ended.

        What a step in flight still brings for it is dropped.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request, reason)
        return self._output(request, [], [])

    def plan(self, now_s: float) -> BatchPlan | None:
        """Decide the next step; None if there is nothing to run and nothing to tell the ranks.

        A plan may have no rows: it then carries ops only. Each plan is committed before the next is made.
        """
        assert self._in_flight is None, "the last plan is not committed"
        self._settle()
        self._cache.settle_fetches(now_s)
        self.stats.queue_s.clear()
        self._budget = self._config.max_tokens_per_step
        ready = self._reserve_running()
        may_admit = len(ready) == len(self._running)
        for request in ready:
            if request.num_left == 1:
                self._plan_row(request)
        for request in ready:
            if request.num_left > 1:
                may_admit = may_admit and self._admit(now_s, before=request)
                if request.slot is not None:  # else preempted; whoever then admits it plans its row
                    self._plan_row(request)
        if may_admit:
            self._admit(now_s)
        rows = [request for request in self._running if request.num_planned]
        if not rows and not self._cache.has_ops:
            return None
        return self._assemble(rows)

    def heartbeat(self) -> BatchPlan:
        """Return a plan without rows, to be run and committed like any other."""
        assert self._in_flight is None, "the last plan is not committed"
        return self._assemble([])

    def commit(self, output: StepOutput) -> list[RequestOutput]:
        """Take in what the step brought and return one output for each request that got a token.

        Raises RelocationVersionError if the engine ran under another version than the plan's (I8).
        """
        step, self._in_flight = self._in_flight, None
        assert step is not None and step.plan.step == output.step, f"step {output.step} was not planned"
        self._settle(step.rows)  # what a row made of a page that failed to load does not count
        planned = step.plan.relocation_version
        if output.relocation_version != planned and self._safety.versions:
            raise RelocationVersionError(output.step, output.relocation_version, planned)
        for request in step.rows:
            if request.slot is not None:  # not aborted meanwhile
                request.num_computed += request.num_planned
                request.num_planned = 0
                self._cache.commit(request.slot, request.num_computed)
        sampled = step.plan.sampled
        assert len(output.token_ids) == len(output.logprobs) == len(sampled), "the engine sampled other rows"
        outputs: list[RequestOutput] = []
        for row, token_id, logprobs in zip(sampled, output.token_ids, output.logprobs, strict=True):
            request = step.rows[row]
            if request.slot is not None:
                outputs.append(self._append(request, token_id, logprobs))
        return outputs

    @property
    def has_moves(self) -> bool:
        """Tell whether pages move to or from the arena: what comes of them is read when a step is planned."""
        return self._cache.has_moves

    def completed(self, step: int) -> None:
        """Note the last step that every rank has completed: pages released before it become free."""
        self._cache.completed(step)

    def stepped(self, plan: BatchPlan, duration_s: float, now_s: float) -> None:
        """Note how long a committed step took: it tells what computing prompts takes."""
        num_tokens = sum(length for length in plan.lens if length > 1)
        self._cache.costs.prefilled(num_tokens, duration_s, now_s)

    def load(self, step_s: float, now_s: float) -> LoadReport:
        """Report the load. Free and cached pages together are what new requests can have at once."""
        num_left = sum(request.num_left for request in self._running if request.num_left > 1)
        num_tokens = self._waiting.num_tokens + num_left
        return load_report(self._cache, len(self._running), len(self._waiting), num_tokens, step_s, now_s)

    def check(self) -> None:
        """Prove that every request is in one place, that rows are reserved, and what its parts prove."""
        self._cache.check()
        self._waiting.check()
        assert self._running == sorted(self._running, key=_order), "the running requests are out of order"
        unfinished = {request.request_id for request in [*self._running, *self._waiting]}
        assert unfinished == self._requests.keys(), "a request is lost, or in two places"
        slots = [request.slot for request in self._running]
        assert None not in slots and len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots), (
            "a slot has two requests, or none and is not free"
        )
        for request in self._running:
            assert request.slot is not None and self._cache.is_reserved(
                request.slot, request.num_computed + request.num_planned
            ), f"{request.request_id} writes beyond its pages"

    def _check_room(self, request_id: RequestId) -> None:
        if request_id in self._requests:
            raise RequestRefusedError(f"request_id: found {request_id}, which is in use: choose a new one")
        if len(self._requests) >= self._max_requests:
            raise QueueFullError(
                f"found {len(self._running)} requests running and {len(self._waiting)} waiting, allowed are "
                f"{self._max_requests} together: retry later or raise max_waiting_requests"
            )

    def _reserve_running(self) -> list[Request]:
        """Reserve pages in order (I4) and return who has all it needs.

        Once one has not, nobody behind it takes new pages: those that come free are its.
        """
        ready: list[Request] = []
        index = 0
        while index < len(self._running):  # preemption takes from its end
            request = self._running[index]
            nobody_is_short = len(ready) == index
            if self._is_reserved(request) or (nobody_is_short and self._reserve(request)):
                ready.append(request)
            index += 1
        return ready

    def _is_reserved(self, request: Request) -> bool:
        assert request.slot is not None
        return self._cache.is_reserved(request.slot, self._reserved_len(request))

    def _reserve(self, request: Request) -> bool:
        """Reserve the pages of all the request's tokens, at the cost of requests behind it.

        False if it has to wait: for pages that quiesce, or, as the last in order, for those ahead of it.
        """
        assert request.slot is not None
        num_tokens = self._reserved_len(request)
        while not self._cache.reserve(request.slot, num_tokens):
            last = self._running[-1]
            if last is request or self._cache.is_coming(request.slot, num_tokens):
                return False
            self._preempt(last)
        return True

    def _reserved_len(self, request: Request) -> int:
        return min(len(request.token_ids) + self._lookahead, request.max_len)

    def _plan_row(self, request: Request) -> None:
        """Give a request its part of the step, unless its prefix is still loading: then it waits alone."""
        assert request.slot is not None and not request.num_planned, f"{request.request_id} is planned twice"
        if not self._cache.is_readable(request.slot):
            return
        request.num_planned = min(request.num_left, self._budget)
        self._budget -= request.num_planned

    def _admit(self, now_s: float, before: Request | None = None) -> bool:
        """Give slots to waiting requests in order, those ahead of `before` or all, while the step has tokens.

        `before` may itself be preempted for one of them; it is not readmitted here.
        False once the first of them has no room: nobody behind it may have it.
        """
        while self._budget > 0 and (request := self._waiting.first) is not None:
            if before is not None and before.order <= request.order:
                break
            if not self._make_way(request):
                return False
            self._open(request, now_s)
            if not self._reserve(request):
                return False
            self._plan_row(request)
        return True

    def _make_way(self, request: Request) -> bool:
        """Tell whether a waiting request can have a slot and pages; preempt those behind it if that helps.

        Beside its pages one spare page a running request is left: else the next steps would preempt it again.
        """
        victims: list[Request] = []
        while not (self._free_slots or victims) or self._num_lacking(request, victims) > 0:
            if len(victims) == len(self._running):
                return False
            victim = self._running[-1 - len(victims)]
            if victim.order < request.order:
                return False
            victims.append(victim)
        for victim in victims:
            self._preempt(victim)
        return True

    def _num_lacking(self, request: Request, victims: list[Request]) -> int:
        return self._cache.num_lacking(
            request.tokens,
            self._reserved_len(request),
            num_spare_pages=len(self._running) - len(victims),
            closing=[victim.slot for victim in victims if victim.slot is not None],
        )

    def _open(self, request: Request, now_s: float) -> None:
        self._waiting.remove(request)
        request.slot = self._free_slots.pop()
        op = OpenSlot(
            slot=request.slot,
            sampling=request.sampling,
            seed=request.seed,
            prompt_len=request.prompt_len,
            token_ids=list(request.token_ids),
            end_token_ids=request.end_token_ids,
        )
        request.num_computed = self._cache.open(op, request.tokens)
        insort(self._running, request, key=_order)
        if not request.was_admitted:
            request.was_admitted = True
            self.stats.queue_s.append(now_s - request.arrival_s)
        if request.num_cached is None:
            request.num_cached = request.num_computed
            request.origins = self._cache.origins(request.slot)

    def _preempt(self, request: Request) -> None:
        """Send a request back to the queue with its tokens; its row in the step being planned is dropped."""
        self._budget += request.num_planned
        self._close(request)
        self._waiting.push(request)
        self.stats.num_preemptions += 1

    def _settle(self, rows: Sequence[Request] = ()) -> None:
        """Take in what has come of moves. Who is on a page that failed to load computes it after all.

        So do `rows` that read one whose LOAD may still turn out torn (I7): devices copy ahead of the verdict.
        """
        slots = self._cache.settle()
        for request in [request for request in self._running if request.slot in slots]:
            if not request.num_generated:
                request.num_cached = None
            self._preempt(request)
        self._cache.drop_failed()
        for request in rows:
            if request.slot is not None and not self._cache.is_proven(request.slot):
                self._preempt(request)
                self.stats.num_unproven_rows += 1

    def _close(self, request: Request) -> None:
        assert request.slot is not None
        self._running.remove(request)
        self._cache.close(request.slot)
        self._free_slots.append(request.slot)
        request.slot = None
        request.num_computed = request.num_planned = 0

    def _assemble(self, rows: list[Request]) -> BatchPlan:
        self._num_steps += 1
        self._cache.planned(self._num_steps)
        self._in_flight = assemble(self._num_steps, self._cache.version, self._cache.take_ops(), rows)
        return self._in_flight.plan

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Give a request its next token and finish it if that was the last."""
        request.token_ids.append(token_id)
        self.stats.num_generated_tokens += 1
        if request.num_generated == 1 and request.num_cached is not None:
            self.stats.prompted(request.prompt_len, request.num_cached, request.origins)
        if token_id in request.stop_token_ids and request.num_generated > request.sampling.min_tokens:
            self._finish(request, "stop")
        elif len(request.token_ids) >= request.max_len:
            self._finish(request, "length")
        return self._output(request, [token_id], [] if logprobs is None else [logprobs])

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._close(request)
        del self._requests[request.request_id]
        request.finish_reason = reason
        self.stats.num_finished[reason] += 1

    def _output(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs]) -> RequestOutput:
        return RequestOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached or 0,
        )
