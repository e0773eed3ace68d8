"""Drill: a storm of requests over a group of real ranks that something befalls; the drill is the supervisor.

As the service's: once a rank is lost the others are ended, a new group is started under the next incarnation
and attached to the same arena, and each answer under way goes on from its prompt and its tokens so far. Here
the other ranks are first given their deadline to end by themselves.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from cluster.replica import Replica
from tests.bench.cache_node import SECRET, CacheNode
from tests.bench.gpu_rank import BenchRank
from tests.bench.gpu_shapes import shape_config
from tests.bench.measuring import say
from tests.gpu.storm_clients import MAX_TOKENS, StormClients
from tests.gpu.storm_compare import Verdict, compare
from tests.harness import bundle_bytes
from tests.rank_processes import REPLICA, Ending, RankFaults, RankProcesses
from workers.card import load_card
from workers.protocol import AbortRequest, RequestOutput

ANSWER_TIMEOUT_S = 60.0
SLACK_S = 6.0
"""Beyond the collectives' deadline: until the interpreter, and on CUDA the driver, have ended a process. That
deadline begins with a step, or a wait for a plan, which one of `deadline_s` may just have gone by."""
ARENA_POOLS = 6


@dataclasses.dataclass
class Told:
    """What came of a drill."""

    verdict: Verdict
    endings: dict[int, Ending]
    """Of the ranks that were to end by themselves."""
    finished: set[str]
    lost_after_s: float | None
    """From what befell the group until clients heard of it; None: they did not."""
    num_tokens_before: int
    """That clients had by then."""


class _Listener:
    """What a router would hear."""

    def welcomed(self, welcome: object) -> None: ...

    def stepped(self, load: object, kv_events: object, answered: object, now_s: float) -> bool:
        return True

    def lost(self) -> None: ...


class Drill:
    """A node, a rank to compare answers with, and the group that serves now. Use as a context manager.

    `options` are WorkerConfig's.
    """

    def __init__(
        self,
        shape: str,
        options: dict[str, Any],
        folder: Path,
        *,
        tp_size: int = 2,
        concurrency: int = 24,
        max_prompt_len: int = 60,
        pool_ratio: float = 0.25,
    ) -> None:
        page_size = options.get("page_size", 4)
        request_len = max_prompt_len + MAX_TOKENS
        pool_tokens = max(int(concurrency * request_len * pool_ratio), request_len)
        self._concurrency, self._max_prompt_len = concurrency, max_prompt_len
        common = {"max_running_requests": concurrency, "max_waiting_requests": 1_000, "num_threads": 1}
        common |= {"page_size": page_size} | options
        self.config = shape_config(
            folder,
            shape,
            common
            | {"num_pages": -(-pool_tokens // page_size) + 1, "kv_sanitizer": True, "tp_size": tp_size},
        )
        self._folder = folder
        self._incarnation = 0
        self._vocab_size = load_card(self.config.model).vocab_size
        self._group: RankProcesses | None = None
        alone = {"num_pages": concurrency * (-(-request_len // page_size) + 1), "prefix_caching": False}
        with ExitStack() as stack:
            self._reference = stack.enter_context(BenchRank(shape, common | alone | {"draft": None}))
            slot_bytes = tp_size * bundle_bytes(self.config, load_card(self.config.model))
            arena_bytes = ARENA_POOLS * pool_tokens // page_size * slot_bytes
            self._node = stack.enter_context(CacheNode(arena_bytes / (1 << 30) + 0.001))
            self._groups = stack.enter_context(ExitStack())
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def deadline_s(self) -> float:
        """Within which a rank that lost another, or its way, has ended."""
        return self.config.collective_timeout_s + SLACK_S

    @property
    def ranks(self) -> list[int]:
        """All of a group."""
        return list(range(self.config.tp_size))

    def start(self, faults: dict[int, RankFaults] | None = None) -> RankProcesses:
        """End the group that serves, and start the next."""
        self._groups.close()
        self._incarnation += 1
        group = RankProcesses(self.config, self._incarnation, self._node.endpoint, self._folder, faults)
        self._group = self._groups.enter_context(group)
        group.await_started()
        return group

    def play(
        self,
        name: str,
        num_requests: int,
        befalls: Callable[[RankProcesses], list[int]] | None = None,
        after_tokens: int = 0,
    ) -> Told:
        """Have requests answered by the group that serves, or a new one, and hold them against the reference.

        `befalls` does something to the group once clients have so many tokens, and returns the ranks that
        must then end by themselves.
        """
        if self._group is None:
            self.start()
        clients = StormClients(name, num_requests, self._concurrency, self._vocab_size, self._max_prompt_len)
        served = _Served(befalls=befalls, after_tokens=after_tokens)
        endings: dict[int, Ending] = {}
        while not clients.are_done:
            assert self._group is not None
            asyncio.run(self._serve(clients, self._group, served))
            if not clients.are_done:
                assert served.befell_s is not None
                endings |= self._group.endings(served.to_end, served.befell_s, self.deadline_s)
                say(f"{name}: clients heard after {served.lost_after_s} s; {endings}")
                self.start()
        asked = list(clients.asked.values())
        assert not clients.num_after_end, "outputs came after their request's end"
        return Told(
            compare(self._reference, [one for one in asked if one.is_greedy], name),
            endings,
            {str(one.finish_reason) for one in asked},
            served.lost_after_s,
            served.num_tokens_before,
        )

    async def _serve(self, clients: StormClients, group: RankProcesses, served: "_Served") -> None:
        """Ask and take until all is answered, or the group is lost."""
        replica = Replica(
            REPLICA, group.endpoint, SECRET, "drill", _Listener(), card_digest=group.card_digest
        )
        await replica.start()
        await replica.wait_ready(ANSWER_TIMEOUT_S)
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        tasks = []

        async def follow(stream: Any) -> None:
            async for output in stream:
                outputs.put_nowait(output)

        def submit(request: Any) -> None:
            streams[request.request_id] = replica.submit(request)
            tasks.append(asyncio.create_task(follow(streams[request.request_id])))

        streams: dict[Any, Any] = {}
        try:
            for request in clients.rest():
                submit(request)
            while not clients.are_done:
                for message in clients.ask(time.perf_counter()):
                    if isinstance(message, AbortRequest):
                        await streams[message.request_id].abort()
                    else:
                        submit(message)
                told = [await asyncio.wait_for(outputs.get(), ANSWER_TIMEOUT_S)]
                while not outputs.empty():
                    told.append(outputs.get_nowait())
                good = [output for output in told if output.finish_reason not in ("error", "rejected")]
                clients.take(good, time.perf_counter())
                served.num_tokens += sum(len(output.token_ids) for output in good)
                if len(good) < len(told):
                    served.lost()
                    return
                served.look(group)
        finally:
            for task in tasks:
                task.cancel()
            await replica.close()


@dataclasses.dataclass
class _Served:
    """What is to befall a group, and what has."""

    befalls: Callable[[RankProcesses], list[int]] | None
    after_tokens: int
    num_tokens: int = 0
    num_tokens_before: int = 0
    to_end: list[int] = dataclasses.field(default_factory=list)
    befell_s: float | None = None
    lost_after_s: float | None = None

    def look(self, group: RankProcesses) -> None:
        if self.befalls is not None and self.num_tokens >= self.after_tokens:
            self.befell_s = time.monotonic()
            self.to_end, self.befalls = self.befalls(group), None

    def lost(self) -> None:
        assert self.befell_s is not None, "the group was lost before anything befell it"
        self.lost_after_s, self.num_tokens_before = time.monotonic() - self.befell_s, self.num_tokens
