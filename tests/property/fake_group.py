"""FakeGroup: a Scheduler over fake ranks, with each stream told in advance by a model of its own."""

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Literal

from cache_service.keys import NamespaceDigest, page_keys, salted
from tests.property.fake_ranks import FakeRank, next_token
from tests.property.fake_sources import TOKEN_S
from tests.property.fake_tier import FakeTier, TierOptions
from workers.completion_board import CompletionBoard
from workers.config import WorkerConfig
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.page_pool import Safety
from workers.plan import BatchPlan, StepOutput
from workers.protocol import FetchHint, FinishReason, RequestId, RequestOutput, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

VOCAB_SIZE = 61
END_TOKEN_IDS = [3, 4, 5, 6, 7]
NAMESPACE = NamespaceDigest(b"n" * 16)
INCARNATION = 11
_SEED = 5


def least_pages(draft_tokens: int | Literal["auto"], page_size: int) -> int:
    """Return how many pages hold two tokens of a request beside the places of its drafts."""
    window = WorkerConfig(draft="fake", draft_tokens=draft_tokens).draft_window if draft_tokens else 0
    return -(-(window + 3) // page_size)


def least_step_tokens(draft_tokens: int | Literal["auto"]) -> int:
    """Return how many tokens a step has that verifies the fewest drafts there are."""
    return 1 + WorkerConfig(draft="fake", draft_tokens=draft_tokens).draft_lens[0] if draft_tokens else 1


RankMaker = Callable[[WorkerConfig, int, int], FakeRank]
"""Makes a rank of the config, the longest context and the incarnation."""


def plain_rank(config: WorkerConfig, max_context_len: int, incarnation: int) -> FakeRank:
    assert config.num_pages is not None
    return FakeRank(config.num_pages, config.page_size, VOCAB_SIZE, incarnation)


class FakeGroup:
    """Drives plan -> run on all ranks -> commit, and runs every check after every step.

    With a depth of 1 a step is committed once the next has run. With a tier, moves and news go a little
    further between any two of these.
    """

    def __init__(
        self,
        *,
        num_pages: int = 16,
        page_size: int = 4,
        num_ranks: int = 1,
        max_running: int = 4,
        max_waiting: int = 100,
        max_tokens_per_step: int = 16,
        max_context_len: int = 48,
        prefix_caching: bool = True,
        depth: int = 0,
        draft_tokens: int | Literal["auto"] = 0,
        target_s: float | None = None,
        seconds_of: Callable[[int], float] = lambda num_tokens: TOKEN_S * num_tokens,
        safety: Safety | None = None,
        runs_checks: bool = True,
        make_rank: RankMaker = plain_rank,
        tier: TierOptions | None = None,
        board: type[CompletionBoard] = CompletionBoard,
    ) -> None:
        config = WorkerConfig(
            page_size=page_size,
            num_pages=num_pages,
            max_running_requests=max_running,
            max_waiting_requests=max_waiting,
            max_tokens_per_step=max_tokens_per_step,
            overlap_depth=depth,  # type: ignore[arg-type]
            draft="fake" if draft_tokens else None,
            draft_tokens=draft_tokens or 1,
            itl_target_ms=None if target_s is None else 1e3 * target_s,
        )
        self.cache = KVCacheManager(
            num_pages, page_size, NAMESPACE, INCARNATION, prefix_caching=prefix_caching, safety=safety
        )
        self.scheduler = Scheduler(
            config,
            self.cache,
            end_token_ids=END_TOKEN_IDS,
            max_context_len=max_context_len,
            vocab_size=VOCAB_SIZE,
            seeds=Random(_SEED),
            safety=safety,
        )
        self.ranks = [make_rank(config, max_context_len, INCARNATION) for _ in range(num_ranks)]
        self.tier = FakeTier(tier, self.cache, self.ranks) if tier is not None else None
        words = bytearray(64 * num_ranks)
        self.boards = [board(rank, num_ranks, words) for rank in range(num_ranks)]
        self.now_s = 0.0
        self.submits: dict[RequestId, SubmitRequest] = {}
        self.seeds: dict[RequestId, int] = {}
        self.streams: dict[RequestId, list[int]] = {}
        self.num_cached: dict[RequestId, int] = {}
        self.reasons: dict[RequestId, FinishReason] = {}
        self.indexed: set[bytes] = set()  # what a router makes of the KVEvents
        self.queue_s: list[float] = []  # of all requests admitted so far
        self.depth = depth
        self._launched: deque[tuple[BatchPlan, StepOutput]] = deque()
        self._admitted: set[RequestId] = set()
        self.is_midstep = False  # for good, once a step failed
        self._max_tokens_per_step = max_tokens_per_step
        self._runs_checks = runs_checks
        self._seconds_of = seconds_of
        self._seeds = Random(_SEED)
        self._expected: dict[RequestId, tuple[list[int], FinishReason]] = {}

    def submit(
        self,
        token_ids: list[int],
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant_salt: bytes = b"",
        hints: list[FetchHint] | None = None,
    ) -> RequestId:
        request_id = RequestId(f"r{len(self.submits)}")
        submit = SubmitRequest(
            request_id, token_ids, sampling or SamplingParams(), priority, tenant_salt, hints or []
        )
        if self.tier is not None:
            self.tier.sources.owner = request_id
        self.scheduler.add(submit, self.now_s)
        if self.tier is not None:
            self.tier.sources.owner = None
        self.submits[request_id] = submit
        seed = submit.sampling.seed
        self.seeds[request_id] = self._seeds.getrandbits(63) if seed is None else seed
        self.streams[request_id] = []
        if self.tier is not None:
            self._expected[request_id] = self.expected(request_id)
            text = token_ids + self._expected[request_id][0]
            keys = page_keys(salted(NAMESPACE, tenant_salt), text, self.cache.page_size)
            self.tier.tell(keys, text, self.cache.page_size)
        return request_id

    def abort(self, request_id: RequestId) -> None:
        output = self.scheduler.abort(request_id, "abort")
        assert (output is None) == (request_id in self.reasons), "an abort ends a request exactly once"
        if output is not None:
            self._take(output)

    @property
    def unfinished(self) -> list[RequestId]:
        return [request_id for request_id in self.submits if request_id not in self.reasons]

    def step(
        self, *, lags: tuple[int, ...] = (), abort_in_flight: RequestId | None = None
    ) -> BatchPlan | None:
        """One step; rank i has then completed all but the last `lags[i]` of those that are over."""
        self.is_midstep = True
        self.now_s += 1.0
        self._move_on()
        plan = self.scheduler.plan(self.now_s)
        self.queue_s += self.scheduler.stats.queue_s
        self.scheduler.stats.queue_s.clear()
        self._check_admitted()
        assert len(self.queue_s) <= len(self.submits), "a request's time in the queue is told twice"
        if plan is not None:
            assert sum(plan.lens) <= self._max_tokens_per_step, "a step has more than its tokens"
            lost = [request for request in self.scheduler._running.requests if request.num_planned]
            assert not lost, "a planned request lost its row"
            if self.tier is not None:
                self.tier.note(plan)
            self._launched.append((plan, self._run(plan)))
            self._move_on()
            if abort_in_flight is not None:
                self.abort(abort_in_flight)
        if self._launched and (plan is None or len(self._launched) > self.depth):
            self._commit(*self._launched.popleft())
        lags = lags or (0,) * len(self.ranks)
        for rank, board, lag in zip(self.ranks, self.boards, lags, strict=True):
            # A rank's device may have ended a step that rank 0 has not collected yet: not rank 0's.
            num_ended = rank.last_step - (len(self._launched) if rank is self.ranks[0] else 0)
            board.publish(rank.finish(num_ended - lag))
        self.scheduler.completed(self.boards[0].minimum())
        removed = self._index_events()
        if self.tier is not None:
            self.tier.check_losses(removed)
        if self._runs_checks:
            self.check()
        self.is_midstep = False
        return plan

    def _commit(self, plan: BatchPlan, output: StepOutput) -> None:
        for request_output in self.scheduler.commit(output):
            self._take(request_output)
        self.scheduler.stepped(plan, self._seconds_of(sum(plan.lens)), self.now_s)

    def _run(self, plan: BatchPlan) -> StepOutput:
        """A row that was misled on one rank, by a page that was torn there, brings nonsense on all."""
        outputs: list[StepOutput] = []
        for rank in self.ranks:
            self._move_on()
            outputs.append(rank.run(plan))
        found = [[token_ids for token_ids, _ in output.tokens_by_row()] for output in outputs]
        rows: list[list[int]] = []
        for place, row in enumerate(plan.sampled):
            misled = [rank for rank in range(len(self.ranks)) if plan.slots[row] in self.ranks[rank].misled]
            rows.append(found[misled[0] if misled else 0][place])
            assert misled or all(tokens[place] == rows[-1] for tokens in found), "ranks differ"
        versions = {output.relocation_version for output in outputs}
        assert len(versions) == 1, "ranks differ"
        token_ids = [token_id for row in rows for token_id in row]
        num_tokens = [len(row) for row in rows] if plan.num_drafts else []
        return StepOutput(plan.step, versions.pop(), token_ids, [None] * len(token_ids), num_tokens)

    def _move_on(self) -> None:
        if self.tier is not None:
            self.tier.sources.now_s = self.now_s
            self.tier.move_on()

    def run(self, max_steps: int = 1000) -> int:
        """Step until no request is left; return the number of steps."""
        for num_steps in range(max_steps):
            if not self.scheduler.has_requests:
                return num_steps
            self.step()
        raise AssertionError(f"requests left after {max_steps} steps: {self.unfinished}")

    def end(self) -> None:
        """Bring every request to its end, however long moves took until now; then settle."""
        assert self.tier is not None
        self.tier.speed_up()
        # Without a tier the first in order gains a token in every step. Here a page may have to be saved
        # before it goes, loaded before it is read, or computed after its load failed: not much longer.
        num_left = sum(self.scheduler.max_context_len for _ in self.unfinished)
        # Nor does it wait for a FETCH any longer than computing its pages takes, at a second a step.
        max_wait_s = TOKEN_S * self.scheduler.max_context_len
        self.run(max_steps=(1 + self.depth) * 3 * num_left + 20 + int(max_wait_s))
        assert self.reasons.keys() == self.submits.keys(), "a request has no finish reason"
        self.settle()

    def settle(self) -> None:
        """Two idle steps, and one for each in flight, bring all pages back: free, or cached and evictable."""
        if self.tier is not None:
            self.tier.speed_up()
            for _ in range(100):
                self.step()
                if not self.scheduler.has_moves and self.tier.is_quiet:
                    break
            self.tier.check_idle()
        for _ in range(2 + self.depth):
            self.step()
        stats = self.cache.stats()
        assert stats.num_quiescing_pages == 0, "a page quiesces for ever"
        assert stats.num_owned_pages == stats.num_cached_pages == stats.num_evictable_pages, "a page leaked"
        for rank in self.ranks:
            assert len(rank.pages) == stats.num_owned_pages and not rank.rows, "a rank's pages differ"
        assert self.step() is None, "an idle group has nothing to say"
        self._check_origins()

    def check(self) -> None:
        self.scheduler.check()
        for rank in self.ranks:
            rank.check()
            assert rank.pages.keys() == self.ranks[0].pages.keys(), "ranks differ"
            for page in rank.pages.keys() - rank.unsure - self.ranks[0].unsure:
                assert rank.pages[page] == self.ranks[0].pages[page], "ranks differ"
        for request_id in self.submits:
            self.check_stream(request_id)

    def check_stream(self, request_id: RequestId) -> None:
        if request_id not in self._expected:
            self._expected[request_id] = self.expected(request_id)
        stream, (expected, reason) = self.streams[request_id], self._expected[request_id]
        assert stream == expected[: len(stream)], f"{request_id} generates another's text"
        if self.reasons.get(request_id, "abort") != "abort":
            assert stream == expected and self.reasons[request_id] == reason, f"{request_id} ends wrongly"

    def expected(self, request_id: RequestId) -> tuple[list[int], FinishReason]:
        """What the request generates when it is alone in the world."""
        submit = self.submits[request_id]
        sampling = submit.sampling
        end_ids = {*([] if sampling.ignore_eos else END_TOKEN_IDS), *sampling.stop_token_ids}
        stream: list[int] = []
        while True:
            banned = end_ids if len(stream) < sampling.min_tokens else ()
            token_ids = submit.token_ids + stream
            stream.append(next_token(token_ids, self.seeds[request_id], VOCAB_SIZE, banned))
            if stream[-1] in end_ids and not banned:
                return stream, "stop"
            if len(stream) == sampling.max_tokens or len(token_ids) + 1 == self.scheduler.max_context_len:
                return stream, "length"

    def _check_admitted(self) -> None:
        for request in self.scheduler._running.requests:
            if self.tier is not None and request.request_id not in self._admitted:
                self.tier.sources.check_admitted(request.request_id)
            self._admitted.add(request.request_id)

    def _check_origins(self) -> None:
        """Each prompt token was found somewhere, or computed, once."""
        stats = self.scheduler.stats
        prompts = [len(self.submits[request_id].token_ids) for request_id in self.num_cached]
        assert stats.prefix_tokens.total() == sum(prompts)
        assert stats.num_cached_tokens == sum(self.num_cached.values())
        assert stats.prefix_tokens["computed"] == sum(prompts) - stats.num_cached_tokens

    def _take(self, output: RequestOutput) -> None:
        request_id = output.request_id
        assert request_id not in self.reasons, f"{request_id} has an output after its end"
        self.streams[request_id] += output.token_ids
        if output.token_ids:
            known = self.num_cached.setdefault(request_id, output.num_cached_tokens)
            assert output.num_cached_tokens == known, "num_cached_tokens changes"
            assert known < len(self.submits[request_id].token_ids), "nothing was left to compute"
        if output.finish_reason is not None:
            self.reasons[request_id] = output.finish_reason

    def _index_events(self) -> list[bytes]:
        """Follow the news of the device's pages; return those that left it."""
        removed: list[bytes] = []
        batch = self.cache.take_events()
        for event in batch.events if batch is not None else ():
            if event.kind == "stored":
                assert self.indexed.isdisjoint(event.keys), "stored twice"
                self.indexed.update(event.keys)
            else:
                assert self.indexed.issuperset(event.keys), "removed, never stored"
                self.indexed.difference_update(event.keys)
                removed += event.keys
        assert self.indexed == set(self.cache.snapshot()[1]), "the events tell another tree"
        return removed
