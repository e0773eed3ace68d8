"""Running: the requests with a slot, and how they come by slot, pages and tokens of a step.

Owned by the Scheduler. All three are given in order (priority, arrival), and taken back from the last.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from workers.kvcache.manager import KVCacheManager
from workers.kvcache.page_pool import Safety
from workers.plan import OpenSlot
from workers.scheduler.admission import WaitingQueue
from workers.scheduler.request import Request
from workers.scheduler.stats import SchedulerStats

_order = attrgetter("order")


@dataclass(slots=True)
class Ready:
    """Who can be part of a step: by order, first those that decode. Is that everyone who runs?"""

    decoding: list[Request]
    prefilling: list[Request]
    is_everyone: bool


class Running:
    """Slots 0 .. max_running - 1. A preempted request goes back to `waiting` with its tokens."""

    def __init__(
        self,
        max_running: int,
        cache: KVCacheManager,
        waiting: WaitingQueue,
        stats: SchedulerStats,
        safety: Safety,
        shares: bool,
        draft_window: int = 0,
    ) -> None:
        """`shares`: a prompt that does not end in a step leaves half of it to those behind that do.
        `draft_window`: places that a request needs behind its tokens."""
        self._draft_window = draft_window
        self._cache = cache
        self._waiting = waiting
        self._stats = stats
        self._reserves_ahead = safety.reserves_ahead
        self._shares = shares
        self._longest: Request | None = None
        self._free_slots = list(range(max_running - 1, -1, -1))
        self.requests: list[Request] = []
        """By order."""
        self._budget = 0

    def reserve(self) -> Ready:
        """Reserve the pages of a step in order (I4) and return who has all it needs.

        Once one has not, nobody behind it takes new pages: those that come free are its. Who ends with a step
        in flight needs none.
        """
        ready = Ready([], [], is_everyone=True)
        for request in list(self.requests):
            num_tokens = len(request.token_ids) + request.num_awaited
            if request.slot is None or num_tokens >= request.max_len:
                continue  # preempted for one ahead of it, or ending
            num_left = num_tokens - request.num_computed - request.num_in_flight
            num_tokens += self._draft_window if self._reserves_ahead else -request.num_awaited
            if num_tokens > request.reserved_len and not (ready.is_everyone and self._reserve(request)):
                ready.is_everyone = False
            elif num_left == 1:
                ready.decoding.append(request)
            else:
                ready.prefilling.append(request)
        return ready

    def begin(self, num_tokens: int) -> None:
        """Begin to give the tokens of a step away."""
        self._budget = num_tokens
        self._longest = None

    def plan_decodes(self, requests: list[Request]) -> None:
        """Give each its next token in the step, as `plan_row` does, and its drafts while all of them fit.

        There is a token for each slot.
        """
        for num_left, request in zip(range(len(requests) - 1, -1, -1), requests, strict=True):
            assert request.slot is not None
            if self._cache.is_readable(request.slot):
                if request.num_drafts < self._budget - num_left:
                    request.num_verified = request.num_drafts
                request.num_planned = 1 + request.num_verified
                self._budget -= request.num_planned

    def verify_alone(self) -> None:
        """Leave the drafts out where prompts are part of the step, and give these the tokens."""
        verifying = [request for request in self.requests if request.num_verified]
        prefilling = [
            request for request in self.requests if request.num_planned > 1 and not request.num_verified
        ]
        for request in verifying if prefilling else ():
            self._budget += request.num_verified
            request.num_planned -= request.num_verified
            request.num_verified = 0
        for request in prefilling if verifying else ():
            num_more = min(request.num_left - request.num_planned, self._budget)
            request.num_planned += num_more
            self._budget -= num_more

    def plan_row(self, request: Request) -> None:
        """Give a request its part of the step, unless its prefix is still loading: then it waits alone."""
        assert request.slot is not None and not request.num_planned, f"{request.request_id} is planned twice"
        if not self._cache.is_readable(request.slot):
            return
        num_tokens = request.num_left
        if num_tokens > self._budget and self._shares:
            if self._longest is not None:
                return  # it has the rest in the end
            self._longest = request
            num_tokens = self._budget - self._budget // 2
        request.num_planned = min(num_tokens, self._budget)
        self._budget -= request.num_planned

    def fill(self) -> None:
        """Give the tokens that are left to the prompt that did not get all it could use."""
        request = self._longest
        if request is not None and request.num_planned:
            num_more = min(request.num_left - request.num_planned, self._budget)
            request.num_planned += num_more
            self._budget -= num_more

    def admit(self, now_s: float, before: Request | None = None) -> bool:
        """Give slots to waiting requests in order, those ahead of `before` or all, while the step has tokens.

        `before` may itself be preempted for one of them; it is not readmitted here.
        False once the first of them has no room: nobody behind it may have it.
        """
        while self._budget > 0 and (request := self._waiting.first) is not None:
            if before is not None and before.order <= request.order:
                break
            if self._longest is not None and self._cache.num_missing(request.tokens) > self._budget:
                return False  # it finds more of its prefix once its turn comes
            if not self._make_way(request) or not self._cache.can_load(request.tokens):
                return False
            self._open(request, now_s)
            if not self._reserve(request):
                return False
            self.plan_row(request)
        return True

    def settle(self) -> None:
        """Take in what has come of moves. Who is on a page that failed to load computes it after all."""
        slots = self._cache.settle()
        for request in [request for request in self.requests if request.slot in slots]:
            if not request.num_generated:
                request.num_cached = None
            self._preempt(request)
        self._cache.drop_failed()

    def drop_unproven(self, rows: Sequence[Request | None]) -> None:
        """Preempt who read a page whose LOAD may still turn out torn (I7): a device copies ahead of that."""
        for request in rows:
            if request is not None and request.slot is not None and not self._cache.is_proven(request.slot):
                self._preempt(request)
                self._stats.num_unproven_rows += 1

    def close(self, request: Request) -> None:
        """Take a request's slot and pages, and what steps in flight bring for it."""
        assert request.slot is not None
        self.requests.remove(request)
        self._cache.close(request.slot)
        self._free_slots.append(request.slot)
        request.slot = None
        request.num_computed = request.num_in_flight = request.num_awaited = request.num_planned = 0
        request.num_drafts = request.num_verified = 0
        request.reserved_len = 0
        request.num_closed += 1

    def check(self) -> None:
        """Prove that requests are in order, each in a slot of its own, and their rows on their pages."""
        assert self.requests == sorted(self.requests, key=_order), "the running requests are out of order"
        slots = [request.slot for request in self.requests]
        assert None not in slots and len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots), (
            "a slot has two requests, or none and is not free"
        )
        for request in self.requests:
            assert request.slot is not None
            num_written = request.num_computed + request.num_in_flight
            assert num_written <= self._cache.reserved_len(request.slot), (
                f"{request.request_id} writes beyond its pages"
            )
            assert request.num_tokens <= request.max_len, f"{request.request_id} runs beyond its end"

    def _reserve(self, request: Request) -> bool:
        """Reserve the pages of all the request's tokens, at the cost of requests behind it.

        False if it has to wait: for pages that quiesce, or that requests at their end still have; or, as the
        last in order, for those ahead of it.
        """
        assert request.slot is not None
        num_tokens = request.num_tokens + self._draft_window
        while not self._cache.reserve(request.slot, num_tokens):
            ending = [other.slot for other in self.requests if other.is_ending and other.slot is not None]
            last = next(other for other in reversed(self.requests) if not other.is_ending)
            if last is request or self._cache.is_coming(request.slot, num_tokens, ending):
                return False
            self._preempt(last)
        request.reserved_len = self._cache.reserved_len(request.slot)
        return True

    def _make_way(self, request: Request) -> bool:
        """Tell whether a waiting request can have a slot and pages; preempt those behind it if that helps.

        Beside its pages one spare page a running request is left: else the next steps would preempt it again.
        """
        staying = [other for other in self.requests if not other.is_ending]
        closing = [other for other in self.requests if other.is_ending]
        victims: list[Request] = []
        while not (self._free_slots or closing) or self._num_lacking(request, closing) > 0:
            if not staying or staying[-1].order < request.order:
                return False
            victims.append(staying.pop())
            closing.append(victims[-1])
        for victim in victims:
            self._preempt(victim)
        return bool(self._free_slots)

    def _num_lacking(self, request: Request, closing: list[Request]) -> int:
        return self._cache.num_lacking(
            request.tokens,
            request.num_tokens + self._draft_window,
            num_spare_pages=len(self.requests) - len(closing),
            closing=[other.slot for other in closing if other.slot is not None],
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
        insort(self.requests, request, key=_order)
        if not request.was_admitted:
            request.was_admitted = True
            self._stats.queue_s.append(now_s - request.arrival_s)
        if request.num_cached is None:
            request.num_cached = request.num_computed
            request.origins = self._cache.origins(request.slot)

    def _preempt(self, request: Request) -> None:
        """Send a request back to the queue with its tokens; its row in the step being planned is dropped."""
        self._budget += request.num_planned
        if request is self._longest:
            self._longest = None
        self.close(request)
        self._waiting.push(request)
        self._stats.num_preemptions += 1
