"""Scheduler: decides which tokens of which requests the next step computes.

Rank 0's step loop owns it and drives it from one thread: add / abort, plan, run the engine, commit.
Plain ints and lists; no torch, no clock and no randomness of its own.
"""

from collections import Counter, deque
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from workers.config import WorkerConfig
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.page_pool import Safety
from workers.plan import BatchPlan, RelocationVersionError, StepOutput
from workers.protocol import (
    FinishReason,
    LoadReport,
    RequestId,
    RequestOutput,
    SubmitRequest,
    TokenLogprobs,
)
from workers.scheduler.admission import Admission, QueueFullError, RequestRefusedError, WaitingQueue
from workers.scheduler.draft_length import DraftLength
from workers.scheduler.request import Request
from workers.scheduler.running import Running
from workers.scheduler.stats import PrefixOrigin, SchedulerStats, load_report
from workers.scheduler.step import Step, assemble
from workers.scheduler.step_budget import StepBudget


class _Kept(NamedTuple):
    """What a sampled row brings its request."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    reason: FinishReason | None
    num_drafts: int
    """That were verified in the row."""
    num_found: int
    """Tokens that the engine has brought, those behind the request's end included."""

    @property
    def num_accepted(self) -> int:
        """Drafts among its tokens."""
        return min(self.num_found - 1, len(self.token_ids))


class Scheduler:
    """Continuous batching over one KVCacheManager.

    Each step: every decoding request's next token, then prefill chunks and admissions in order, within
    the step's budget. Order is (priority, arrival). A request short of pages takes them from the last in
    order, never from one ahead of it; so the first in order always progresses and nothing fails for lack of
    pages. A preempted request keeps its tokens and computes them again, or finds them in the cache.

    Up to `config.depth` steps may be in flight, planned and not committed, when the next is planned: each of
    their rows is taken to go on by one token. Where it ends instead, its row in the next step is void, and
    so are all of a request that has lost its slot since. A step that speculates is committed first.
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
        step_sizes: Sequence[int] = (),
        safety: Safety | None = None,
    ) -> None:
        """`seeds` gives seeds to requests that bring none. `step_sizes`: Engine's."""
        capacity = cache.num_pages * cache.page_size - config.draft_window
        self.max_context_len = min(max_context_len, capacity)
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
        self._safety = safety or Safety()
        # Never more requests than tokens in a step, so that each of them can have one.
        max_running = min(config.max_running_requests, config.max_tokens_per_step)
        self.max_requests = max_running + config.max_waiting_requests
        """Running and waiting together."""
        self._requests: dict[RequestId, Request] = {}
        self._waiting = WaitingQueue()
        self._running = Running(
            max_running,
            cache,
            self._waiting,
            self.stats,
            self._safety,
            shares=config.itl_target_ms is not None,
            draft_window=config.draft_window,
        )
        target_ms = config.itl_target_ms
        target_s = None if target_ms is None else target_ms / 1e3
        self._budget = StepBudget(config.max_tokens_per_step, target_s, step_sizes)
        is_auto = bool(config.draft_lens) and config.draft_tokens == "auto"
        self._draft_length = None
        if is_auto:
            lens, topk = config.draft_lens, config.draft_topk
            self._draft_length = DraftLength(lens, config.max_tokens_per_step, topk)
        if self._draft_length is not None:
            self.stats.draft_switches = self._draft_length.switches
        self._num_steps = 0
        self._in_flight: deque[Step] = deque()

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running.requests)

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
        return RequestOutput(request_id, [], [], request.finish_reason, request.num_cached or 0)

    def plan(self, now_s: float) -> BatchPlan | None:
        """Decide the next step; None if there is nothing to run and nothing to tell the ranks, or not yet.

        A plan may have no rows: it then carries ops only, and none but it is in flight.
        """
        assert len(self._in_flight) <= self._config.depth, "commit the oldest step first"
        if self._in_flight and self._in_flight[-1].plan.speculates:
            return None  # it says first how far its rows have come
        running = self._running
        running.settle()
        self._cache.settle_fetches(now_s)
        ready = running.reserve()
        running.begin(self._budget.num_tokens(len(ready.decoding)))
        running.plan_decodes(ready.decoding)
        may_admit = ready.is_everyone
        for request in ready.prefilling:
            may_admit = may_admit and running.admit(now_s, before=request)
            if request.slot is not None:  # else preempted; whoever then admits it plans its row
                running.plan_row(request)
        if may_admit:
            running.admit(now_s)
        running.fill()
        if self._config.draft_topk > 1:
            running.verify_alone()
        rows = [request for request in running.requests if request.num_planned]
        if not rows and (self._in_flight or not self._cache.has_ops):
            return None
        return self._assemble(rows)

    def heartbeat(self) -> BatchPlan:
        """Return a plan without rows, to be run and committed like any other."""
        assert not self._in_flight, "a step is in flight, which tells as much"
        return self._assemble([])

    def commit(self, output: StepOutput) -> list[RequestOutput]:
        """Take in what the oldest step in flight brought; return an output for each request that got a token.

        Raises RelocationVersionError if the engine ran under another version than the plan's (I8).
        """
        assert self._in_flight, f"step {output.step} was not planned"
        step = self._in_flight.popleft()
        plan = step.plan
        assert plan.step == output.step, f"step {output.step} comes before step {plan.step}"
        self._running.settle()  # what a row made of a page that failed to load does not count
        planned = plan.relocation_version
        if output.relocation_version != planned and self._safety.versions:
            raise RelocationVersionError(output.step, output.relocation_version, planned)
        self._running.drop_unproven(self._rows_of(step))
        rows = self._rows_of(step)
        kept = self._append(rows, plan, output)
        self._compute(rows, plan, kept)
        return [self._answer(rows[row], tokens) for row, tokens in kept.items()]

    @property
    def has_moves(self) -> bool:
        """Tell whether pages move to or from the arena: what comes of them is read when a step is planned."""
        return self._cache.has_moves

    def completed(self, step: int) -> None:
        """Note the last step that every rank has completed: pages released before it become free."""
        self._cache.completed(step)

    def stepped(self, plan: BatchPlan, duration_s: float, now_s: float) -> None:
        """Note how long a committed step took: what it says of prompts and of the steps to come."""
        self._budget.stepped(plan, duration_s)
        if self._draft_length is not None:
            self._draft_length.stepped(plan, duration_s)
        self._cache.costs.prefilled(plan.num_prefill_tokens, duration_s, now_s)

    def load(self, step_s: float, now_s: float) -> LoadReport:
        """Report the load. Free and cached pages together are what new requests can have at once."""
        num_left = sum(request.num_left for request in self._running.requests if request.num_left > 1)
        num_tokens = self._waiting.num_tokens + num_left
        return load_report(self._cache, self.num_running, len(self._waiting), num_tokens, step_s, now_s)

    def check(self) -> None:
        """Prove that every request is in one place, that rows are reserved, and what its parts prove."""
        self._cache.check()
        self._waiting.check()
        self._running.check()
        unfinished = {request.request_id for request in [*self._running.requests, *self._waiting]}
        assert unfinished == self._requests.keys(), "a request is lost, or in two places"
        num_rows = Counter(
            request.request_id
            for step in self._in_flight
            for request, num_closed in zip(step.requests, step.num_closed, strict=True)
            if request.num_closed == num_closed
        )
        for request in self._running.requests:
            has_rows = request.num_in_flight >= num_rows[request.request_id] >= request.num_awaited
            assert has_rows and (request.num_in_flight > 0) == (num_rows[request.request_id] > 0), (
                f"{request.request_id} miscounts its rows in flight"
            )

    def _check_room(self, request_id: RequestId) -> None:
        if request_id in self._requests:
            raise RequestRefusedError(f"request_id: found {request_id}, which is in use: choose a new one")
        if len(self._requests) >= self.max_requests:
            raise QueueFullError(
                f"found {self.num_running} requests running and {len(self._waiting)} waiting, allowed are "
                f"{self.max_requests} together: retry later or raise max_waiting_requests"
            )

    def _assemble(self, rows: list[Request]) -> BatchPlan:
        self._num_steps += 1
        self._cache.planned(self._num_steps)
        ops, draft_len = self._cache.take_ops(), max(self._config.draft_lens, default=0)
        topk, num_sampled = self._config.draft_topk, sum(request.is_sampled for request in rows)
        if topk > 1 and num_sampled < len(rows):
            draft_len = 0  # the next step goes on with a prompt, beside which no tree is verified
        elif self._draft_length is not None:
            draft_len = self._draft_length.choose(num_sampled)
        step = assemble(self._num_steps, self._cache.version, ops, rows, draft_len, topk)
        self._in_flight.append(step)
        if self._config.draft_lens and step.plan.sampled:
            self.stats.draft_steps[draft_len] += 1
        return step.plan

    def _rows_of(self, step: Step) -> list[Request | None]:
        """Return the requests of a step's rows, None where a row is void."""
        return step.rows() if self._safety.voids_rows else step.rows_with_a_slot()

    def _append(self, rows: list[Request | None], plan: BatchPlan, output: StepOutput) -> dict[int, _Kept]:
        """Give requests their next tokens, up to one that ends them; return what each row has kept."""
        found = output.tokens_by_row()
        assert len(found) == len(plan.sampled), "the engine sampled other rows"
        kept: dict[int, _Kept] = {}
        for row, (token_ids, logprobs) in zip(plan.sampled, found, strict=True):
            request = rows[row]
            if request is None:
                continue
            request.num_awaited -= 1
            is_first, reason = not request.num_generated, None
            num_kept = 0
            room = request.max_len - len(request.token_ids)
            if len(token_ids) < room and request.stop_token_ids.isdisjoint(token_ids):
                request.token_ids += token_ids
                num_kept = len(token_ids)
            while num_kept < len(token_ids) and reason is None:
                request.token_ids.append(token_ids[num_kept])
                reason = self._reason(request, token_ids[num_kept])
                num_kept += 1
            if is_first and request.num_cached is not None:
                self.stats.prompted(request.prompt_len, request.num_cached, request.origins)
            kept[row] = _Kept(
                token_ids[:num_kept], logprobs[:num_kept], reason, plan.drafts(row), len(token_ids)
            )
        num_tokens = sum(len(each.token_ids) for each in kept.values())
        self.stats.num_generated_tokens += num_tokens
        self.stats.step_tokens[plan.mode] += num_tokens
        return kept

    def _reason(self, request: Request, token_id: int) -> FinishReason | None:
        """Return why its newest token ends a request; None: it does not."""
        if token_id in request.stop_token_ids and request.num_generated > request.sampling.min_tokens:
            return "stop"
        return "length" if len(request.token_ids) >= request.max_len else None

    def _compute(self, rows: list[Request | None], plan: BatchPlan, kept: dict[int, _Kept]) -> None:
        """Count what rows have computed; pages that are whole by that go into the cache.

        A row with drafts has computed as many tokens as it has kept: its own, and the drafts that were right.
        """
        page_size = self._cache.page_size
        verified: Counter[tuple[PrefixOrigin, int, int]] = Counter()
        for row, (request, length) in enumerate(zip(rows, plan.lens, strict=True)):
            if request is None:
                continue
            num_drafts = plan.drafts(row)
            num_more = length - num_drafts
            if num_drafts:
                num_more += len(kept[row].token_ids) - 1
                verified[request.main_origin, num_drafts, kept[row].num_found] += 1
            num_computed = request.num_computed + num_more
            if num_computed // page_size > request.num_computed // page_size:
                assert request.slot is not None
                self._cache.commit(request.slot, num_computed)
            request.num_computed = num_computed
            request.num_in_flight -= length
        # What became of rows' drafts counts behind the request's end, too; of trees by their depth.
        for (origin, num_drafts, num_found), num_rows in verified.items():
            draft_len = num_drafts // self._config.draft_topk
            self.stats.verified(draft_len, num_found, origin, num_rows)
            if self._draft_length is not None:
                self._draft_length.verified(draft_len, num_found - 1, num_rows)

    def _answer(self, request: Request | None, kept: _Kept) -> RequestOutput:
        """End a request where its last token did, and tell what it has got."""
        assert request is not None, "a void row keeps nothing"
        if kept.reason is not None:
            self._finish(request, kept.reason)
        return RequestOutput(
            request.request_id,
            kept.token_ids,
            [each for each in kept.logprobs if each is not None],
            request.finish_reason,
            request.num_cached or 0,
            num_accepted_drafts=kept.num_accepted,
            num_rejected_drafts=kept.num_drafts - kept.num_accepted,
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._running.close(request)
        del self._requests[request.request_id]
        request.finish_reason = reason
        self.stats.num_finished[reason] += 1
