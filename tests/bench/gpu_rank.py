"""A rank with its real step loop, without Ray and sockets: the clients are objects of the same thread.

What a client sees is timed where the service would send it: after a step's commit.
"""

import dataclasses
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Protocol

import msgspec

from tests.bench.cache_node import SECRET, CacheNode
from tests.bench.follower_ranks import BenchGroup, FollowerRanks, TierTask, wait_until_usable
from tests.bench.gpu_shapes import shape_config
from workers.card import load_card
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.host_pages import CachePlace, HostPages
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.moves import MoveInjection
from workers.kvcache.page_pool import Safety
from workers.plan import BatchPlan, StepOutput
from workers.protocol import Received, RequestId, RequestOutput
from workers.scheduler.scheduler import Scheduler
from workers.scheduler.step_budget import StepBudget
from workers.step_loop import STALL_S, StepLoop

FIRST_TOKEN = 100
"""Prompts are of random tokens from here on."""


class Clients(Protocol):
    """What asks for answers: the rank calls both from its loop."""

    @property
    def are_done(self) -> bool:
        """Tell whether all answers have come."""
        ...

    def ask(self, now_s: float) -> list[Received]:
        """Return what is due by now."""
        ...

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until something may be due; 0 where an answer has to come first."""
        ...

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        """See what a step brought."""


@dataclasses.dataclass
class StepRecord:
    """How one step ran."""

    mode: str
    outcome: str
    """`replay`, `replay_after_load` or `eager`."""
    num_decodes: int
    """Rows of one token each: requests that generate."""
    num_tokens: int
    duration_s: float = 0.0
    was_moving: bool = False
    """Pages were on their way between device and host when it began."""
    num_evictions: int = 0
    """Of pages since the step before."""


Launched = Callable[[BatchPlan, StepRecord | None], None]


class BenchRank:
    """Rank 0 of a group, in this process; the others are in processes of their own.

    Use as a context manager. `options` are WorkerConfig's beside the shape. `followers` are borrowed; without
    them a group of several ranks starts its own.
    """

    def __init__(
        self,
        shape: str,
        options: dict[str, Any],
        mechanisms: Mechanisms = ALL_ON,
        safety: Safety | None = None,
        followers: FollowerRanks | None = None,
    ) -> None:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = self.config = shape_config(Path(folder), shape, options)
            card = load_card(config.model)
            self.model = card.config
            began_s = time.perf_counter()
            if config.tp_size == 1:
                self._group, self._followers = BenchGroup.single(), None
            else:
                self._followers = followers or stack.enter_context(
                    FollowerRanks(config.tp_size - 1, config.device)
                )
                self._group = stack.enter_context(self._followers.group(config, mechanisms))
            self._has_begun = False
            self.engine = Engine(config, card, self._group, mechanisms)
            stack.callback(self.engine.close)
            self.start_s = time.perf_counter() - began_s
            gc.collect()  # as a Worker does
            gc.freeze()
            stack.callback(gc.unfreeze)
            cache = self.cache = KVCacheManager(
                self.engine.num_pages,
                config.page_size,
                self.engine.namespace.digest(),
                incarnation=1,
                prefix_caching=config.prefix_caching,
                safety=safety,
            )
            self.host_pages: HostPages | None = None
            self._mechanisms = mechanisms
            self.scheduler = Scheduler(
                config,
                cache,
                end_token_ids=[],
                max_context_len=self.engine.max_context_len,
                vocab_size=card.vocab_size,
                seeds=Random(0),
                step_sizes=self.engine.step_sizes,
            )
            self._resources = stack.pop_all()

    def __enter__(self) -> "BenchRank":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def attach(self, node: CacheNode, injection: MoveInjection | None = None) -> HostPages:
        """Save pages to a node's arena and load them, once all of the arena can be had; the caller closes."""
        assert not self._has_begun, "the ranks run"
        self._has_begun = True
        if self._followers is not None:
            self._followers.begin(TierTask(node.endpoint, self._mechanisms, injection))
        pages = self.host_pages = HostPages(
            CachePlace(node.endpoint, SECRET),
            self.config,
            self.engine,
            self._group,
            1,
            self._mechanisms,
            injection,
        )
        pages.lead(self.cache)
        wait_until_usable(pages, self.config.device)
        if self._followers is not None:
            self._followers.await_begun()
        return pages

    def limit_steps(self, max_tokens: int, target_ms: float | None) -> None:
        """Plan from now on as with other options `max_tokens_per_step`, not above its own, and
        `itl_target_ms`."""
        assert max_tokens <= self.config.max_tokens_per_step, "the engine holds no such step"
        self.scheduler._budget = StepBudget(max_tokens, None if target_ms is None else target_ms / 1e3)

    @property
    def weight_bytes_read(self) -> int:
        """Bytes of weights that a decode step cannot but read: of the embedding only where it is the head."""
        shape, width = self.model, 4 if self.config.dtype == "float32" else 2
        attention = shape.head_dim * shape.hidden_size * 2 * (shape.num_heads + shape.num_kv_heads)
        layer = attention + 3 * shape.hidden_size * shape.intermediate_size
        return width * (shape.num_layers * layer + shape.vocab_size * shape.hidden_size)

    @property
    def token_bytes(self) -> float:
        """Bytes of KV a token, on all ranks."""
        return self.config.tp_size * self.engine.layout.bundle_bytes / self.config.page_size

    def run(
        self,
        clients: Clients,
        timeout_s: float = 300.0,
        launched: Launched | None = None,
    ) -> list[StepRecord]:
        """Step until the clients have all their answers; return how each step ran.

        `launched` is told of each step; of one without rows there is no record.
        """
        self._begin()
        records: dict[int, StepRecord] = {}
        inbox = _Inbox(clients, timeout_s)
        loop = StepLoop(
            self.scheduler,
            _WatchedEngine(self, records, launched),
            self._group,
            inbox,
            _Recorder(self.cache, records),
            self.cache.take_events,
            incarnation=1,
            clock=time.perf_counter,
            depth=self.config.depth,
        )
        inbox.stop = loop.stop
        loop.run()
        return list(records.values())

    def settle(self, timeout_s: float = 60.0) -> None:
        """After a run: step until nothing moves and no page waits for a step; then prove what is left."""
        deadline_s = time.perf_counter() + timeout_s
        while self.scheduler.has_moves or self.cache.stats().num_quiescing_pages:
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"pages do not come to rest: {self.cache.stats()}")
            self.scheduler.completed(self._group.board.minimum())
            plan = self.scheduler.plan(time.perf_counter())
            if plan is None:
                time.sleep(STALL_S)
                continue
            if self._followers is not None:
                self._group.broadcast_plan(msgspec.msgpack.encode(plan))
            output = self.engine.run(plan)
            self._group.board.publish(plan.step)
            self.scheduler.commit(output)
        self.cache.take_events()
        self.scheduler.check()

    def _begin(self) -> None:
        """Let the followers run without a tier unless they run."""
        if not self._has_begun and self._followers is not None:
            self._followers.begin(None)
            self._followers.await_begun()
        self._has_begun = True

    @property
    def num_moving(self) -> int:
        """Pages on their way between device and host."""
        return 0 if self.host_pages is None else self.host_pages.mover.num_in_flight


class _Inbox:
    """The loop's inbox, filled by the clients."""

    def __init__(self, clients: Clients, timeout_s: float) -> None:
        self._clients = clients
        self._end_s = time.perf_counter() + timeout_s
        self.requests: list[RequestId] = []  # a failed step raises: nobody is to be told
        self.stop = lambda: None

    def drain(self, timeout_s: float) -> list[Received]:
        now_s = time.perf_counter()
        if now_s > self._end_s:
            raise TimeoutError("the workload did not end in time")
        received = self._clients.ask(now_s)
        if not received and timeout_s > 0:
            time.sleep(min(timeout_s, self._clients.wait_s(now_s) or timeout_s))
            received = self._clients.ask(time.perf_counter())
        return received

    def publish(self, outputs: list[RequestOutput], **_: object) -> None:
        refused = [output for output in outputs if output.finish_reason in ("rejected", "error")]
        assert not refused, f"refused: {refused[0].error}"
        self._clients.take(outputs, time.perf_counter())
        if self._clients.are_done:
            self.stop()


class _WatchedEngine:
    """The rank's engine; notes how the guard had each step run."""

    def __init__(
        self,
        rank: BenchRank,
        records: dict[int, StepRecord],
        launched: Launched | None,
    ) -> None:
        self._rank = rank
        self._records = records
        self._launched = launched

    def launch(self, plan: BatchPlan) -> None:
        engine, before = self._rank.engine, Counter(self._rank.engine.graph_steps)
        was_moving = self._rank.num_moving > 0
        engine.launch(plan)
        for part, outcome in Counter(engine.graph_steps) - before:
            if part != plan.mode:  # the draft's
                continue
            num_decodes = sum(length - plan.drafts(row) == 1 for row, length in enumerate(plan.lens))
            record = StepRecord(part, outcome, num_decodes, sum(plan.lens), was_moving=was_moving)
            self._records[plan.step] = record
        if self._launched is not None:
            self._launched(plan, self._records.get(plan.step))

    def collect(self) -> StepOutput:
        return self._rank.engine.collect()

    @property
    def has_ended(self) -> bool:
        return self._rank.engine.has_ended


class _Recorder:
    """Takes the loop's durations."""

    def __init__(self, cache: KVCacheManager, records: dict[int, StepRecord]) -> None:
        self._cache = cache
        self._records = records
        self._num_evictions = cache.stats().num_evictions

    def stepped(self, plan: BatchPlan, duration_s: float) -> None:
        if (record := self._records.get(plan.step)) is not None:
            before, self._num_evictions = self._num_evictions, self._cache.stats().num_evictions
            record.duration_s, record.num_evictions = duration_s, self._num_evictions - before

    def loaded(self, load: object) -> None:
        pass


def prompt(random: Random, length: int, vocab_size: int) -> list[int]:
    return [random.randrange(FIRST_TOKEN, vocab_size) for _ in range(length)]
