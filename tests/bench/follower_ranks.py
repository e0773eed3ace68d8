"""FollowerRanks: processes for the ranks beyond the first of a BenchRank's group, on CUDA with a card each.

Kept, they serve one group after the other. Rank 0 lives in the process that makes them.
"""

import dataclasses
import gc
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from tests.bench.cache_node import SECRET, eventually
from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.mechanisms import Mechanisms
from workers.host_pages import CachePlace, HostPages
from workers.kvcache.moves import MoveInjection
from workers.parallel import TPGroup, listen
from workers.step_loop import END_OF_LOG, FollowerLoop

HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
SILENCE_S = 900.0
"""Rank 0 says nothing while it waits for another rank's answers, or builds what it compares them with."""
END_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class RankTask:
    """What one follower is to be."""

    config: WorkerConfig
    rank: int
    port: int
    mechanisms: Mechanisms


@dataclasses.dataclass(frozen=True)
class TierTask:
    """Where it finds its node's arena."""

    endpoint: str
    mechanisms: Mechanisms
    injection: MoveInjection | None


class BenchGroup(TPGroup):
    """A group whose log goes on when a StepLoop ends: `end_log` ends it."""

    def broadcast_plan(self, plan: bytes) -> None:
        """Send a plan, but not the end that a StepLoop sends when its clients have what they want."""
        if plan != END_OF_LOG:
            super().broadcast_plan(plan)

    def end_log(self) -> None:
        """Let the followers' loops end."""
        super().broadcast_plan(END_OF_LOG)


class FollowerRanks:
    """Use as a context manager. `cards`: of the ranks from 0 on; by default those that this process sees.

    Each follower sees its own card alone, as a worker does that Ray has placed.
    """

    def __init__(self, num_ranks: int, device: str, cards: list[str] | None = None) -> None:
        self.num_ranks = num_ranks
        cards = cards or visible_cards(num_ranks + 1)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(1, num_ranks + 1):
            mine, theirs = context.Pipe()
            process = context.Process(target=follow, args=(theirs,), name=f"rank-{rank}", daemon=True)
            with environment({"CUDA_VISIBLE_DEVICES": cards[rank]} if device == "cuda" else {}):
                process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends the process once it is idle
        for process in self._processes:
            process.join(END_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join(END_TIMEOUT_S)

    @contextmanager
    def group(self, config: WorkerConfig, mechanisms: Mechanisms) -> Iterator[BenchGroup]:
        """Yield rank 0's membership of a group of all; the followers build their engines meanwhile.

        What a follower raised is added to what this process raises.
        """
        assert config.tp_size == self.num_ranks + 1, f"there are {self.num_ranks} followers"
        listener = listen(HOST)
        port = listener.getsockname()[1]
        for rank, pipe in enumerate(self._pipes, start=1):
            pipe.send(RankTask(config, rank, port, mechanisms))
        group = BenchGroup.connect(
            0,
            config.tp_size,
            HOST,
            port,
            timeout_s=config.collective_timeout_s,
            meeting_timeout_s=START_TIMEOUT_S,
            device=config.device,
            one_shot=config.one_shot_sums,
            listener=listener,
        )
        try:
            yield group
            group.end_log()
            failures = self._failures(END_TIMEOUT_S)
            assert not any(failures), f"followers failed: {failures}"
        except Exception as error:
            group.close()
            for rank, failure in enumerate(self._failures(1.0), start=1):
                error.add_note(f"rank {rank}: {failure}")
            raise
        finally:
            group.close()

    def begin(self, tier: TierTask | None) -> None:
        """Have the followers attach to the tier, if there is one, and begin; once for each group."""
        for pipe in self._pipes:
            pipe.send(tier)

    def await_begun(self) -> None:
        """Wait until all followers do."""
        for rank, pipe in enumerate(self._pipes, start=1):
            said = pipe.recv() if pipe.poll(START_TIMEOUT_S) else "silent"
            assert said == "begun", f"rank {rank}: {said}"

    def _failures(self, timeout_s: float) -> list[str | None]:
        return [pipe.recv() if pipe.poll(timeout_s) else "silent" for pipe in self._pipes]


def follow(pipe: Connection) -> None:
    """Be a rank of one group after the other; tell the parent what went wrong, None if nothing."""
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        failure: str | None = None
        try:
            _be_rank(pipe, task)
        except Exception:  # the process's top
            failure = traceback.format_exc()
        gc.unfreeze()
        gc.collect()
        pipe.send(failure)


def _be_rank(pipe: Connection, task: RankTask) -> None:
    config = task.config
    if config.device == "cpu":
        torch.set_num_threads(max(config.num_threads, 1))
    with ExitStack() as stack:
        group = TPGroup.connect(
            task.rank,
            config.tp_size,
            HOST,
            task.port,
            timeout_s=config.collective_timeout_s,
            meeting_timeout_s=START_TIMEOUT_S,
            device=config.device,
            one_shot=config.one_shot_sums,
        )
        stack.callback(group.close)
        engine = Engine(config, load_card(config.model), group, task.mechanisms)
        stack.callback(engine.close)
        tier: TierTask | None = pipe.recv()
        if tier is not None:
            stack.callback(_attached(tier, config, engine, group).close)
        gc.collect()  # as a Worker does
        gc.freeze()
        pipe.send("begun")
        FollowerLoop(engine, group, silence_s=SILENCE_S, depth=config.depth).run()


def _attached(tier: TierTask, config: WorkerConfig, engine: Engine, group: TPGroup) -> HostPages:
    pages = HostPages(
        CachePlace(tier.endpoint, SECRET), config, engine, group, 1, tier.mechanisms, tier.injection
    )
    wait_until_usable(pages, config.device)
    return pages


def wait_until_usable(pages: HostPages, device: str) -> None:
    """Wait until all of the arena can be had, and is pinned where a device copies it by itself."""
    arena, num_pinned_bytes = pages.client.arena, pages.mover.stats.num_pinned_bytes
    eventually(lambda: arena.num_usable_slots == arena.spec.num_slots, START_TIMEOUT_S)
    if device == "cuda":
        num_bytes = arena.spec.num_slots * arena.spec.slot_bytes
        eventually(lambda: num_pinned_bytes() == num_bytes, START_TIMEOUT_S)


def visible_cards(num_cards: int) -> list[str]:
    """Return the names of the first cards that this process may use."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (told.split(",") if told else [str(card) for card in range(num_cards)])[:num_cards]


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
