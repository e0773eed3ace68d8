"""RankProcesses: the ranks of one TP group as Ray would start them, each in a process, with faults to order.

Each is a workers.rank.Rank; a rank whose loop fails ends its process, as a Worker does.
"""

import gc
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Self

from tests.bench.cache_node import SECRET
from tests.bench.follower_ranks import HOST, START_TIMEOUT_S, environment, visible_cards
from tests.harness import without
from workers.completion_board import CompletionBoard
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.kvcache.moves import MoveInjection
from workers.plan import BatchPlan, OwnPages
from workers.protocol import ReplicaId
from workers.rank import Rank, RankSpec

REPLICA = ReplicaId("replica-0")
FAILED_EXIT_CODE = 1
LOOK_S = 0.02


@dataclass(frozen=True)
class RankFaults:
    """What is wrong with one rank from the start."""

    injection: MoveInjection | None = None
    """Of its SAVEs and LOADs"""
    max_completion_delay_s: float = 0.0
    """Its steps count as complete so much later, at random"""


@dataclass
class Ending:
    """How a rank's process ended."""

    code: int
    after_s: float
    """From what befell the group"""
    error: str | None = None
    """What its loop raised"""


class RankProcesses:
    """Use as a context manager, at whose end every rank is dead."""

    def __init__(
        self,
        config: WorkerConfig,
        incarnation: int,
        cache_endpoint: str | None,
        dump_folder: Path,
        faults: dict[int, RankFaults] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        cards, port = visible_cards(config.tp_size), _free_port()
        self.size = config.tp_size
        self.incarnation = incarnation
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self.size):
            spec = RankSpec(
                config=config,
                replica_id=REPLICA,
                rank=rank,
                incarnation=incarnation,
                node=HOST,
                group_host=HOST,
                group_port=port,
                num_threads=1,
                cache_endpoint=cache_endpoint,
                dump_folder=dump_folder,
            )
            mine, theirs = context.Pipe()
            of_rank = (faults or {}).get(rank, RankFaults())
            process = context.Process(target=be_rank, args=(theirs, spec, of_rank), daemon=True)
            with environment({"CUDA_VISIBLE_DEVICES": cards[rank]} if config.device == "cuda" else {}):
                process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.endpoint = ""
        """Of rank 0's inbox"""
        self.card_digest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join(30.0)

    def await_started(self) -> None:
        """Wait until every rank steps."""
        for rank, pipe in enumerate(self._pipes):
            kind, *told = pipe.recv() if pipe.poll(START_TIMEOUT_S) else ("silent",)
            assert kind == "started", f"rank {rank}: {kind} {told}"
            if rank == 0:
                self.endpoint, self.card_digest = told

    def kill(self, rank: int) -> None:
        """End a rank's process where it stands."""
        os.kill(self._processes[rank].pid, signal.SIGKILL)

    def hang(self, rank: int) -> None:
        """Stop a rank's threads where they stand; its device ends what it was given."""
        os.kill(self._processes[rank].pid, signal.SIGSTOP)

    def lose_an_op(self, rank: int) -> None:
        """Have a rank miss one op of its next plan that owns pages."""
        self._pipes[rank].send("lose")

    def endings(self, ranks: list[int], began_s: float, timeout_s: float) -> dict[int, Ending]:
        """Wait for the ranks to end by themselves; those that have not `timeout_s` after `began_s`, by the
        monotonic clock, are left out."""
        found: dict[int, Ending] = {}
        while len(found) < len(ranks) and (after_s := time.monotonic() - began_s) < timeout_s:
            for rank in ranks:
                if rank not in found and (code := self._processes[rank].exitcode) is not None:
                    found[rank] = Ending(code, after_s, self._error(rank))
            time.sleep(LOOK_S)
        return found

    def _error(self, rank: int) -> str | None:
        pipe = self._pipes[rank]
        try:
            while pipe.poll():
                kind, *told = pipe.recv()
                if kind == "failed":
                    return str(told[0])
        except EOFError:
            pass
        return None


class LateBoard:
    """A rank's board that tells of its steps late, in order, from a thread of its own."""

    def __init__(self, board: CompletionBoard, random: Random, max_delay_s: float) -> None:
        self._board = board
        self._random = random
        self._max_delay_s = max_delay_s
        self._counts: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._tell, daemon=True).start()

    def publish(self, count: int) -> None:
        self._counts.put(count)

    def counts(self) -> list[int]:
        return self._board.counts()

    def minimum(self) -> int:
        return self._board.minimum()

    def close(self) -> None:
        """Leave the board mapped: the thread may be telling."""

    def _tell(self) -> None:
        while True:
            count = self._counts.get()
            time.sleep(self._random.uniform(0, self._max_delay_s))
            self._board.publish(count)


@dataclass
class LossyEngine:
    """Launches a rank's plans, one of them without one of its ops once it is told to lose it."""

    engine: Engine
    loses: threading.Event = field(default_factory=threading.Event)

    def launch(self, plan: BatchPlan) -> None:
        if self.loses.is_set() and any(isinstance(op, OwnPages) for op in plan.ops):
            self.loses.clear()
            plan = without(plan, OwnPages)
        self.engine.launch(plan)

    def collect(self) -> Any:
        return self.engine.collect()

    @property
    def has_ended(self) -> bool:
        return self.engine.has_ended


def be_rank(pipe: Connection, spec: RankSpec, faults: RankFaults) -> None:
    """Be one rank until it is stopped or fails; the process ends with it."""
    try:
        rank = Rank(spec, SECRET, injection=faults.injection)
        if faults.max_completion_delay_s:
            late = LateBoard(rank._group.board, Random(spec.rank), faults.max_completion_delay_s)
            rank._group.board = late  # type: ignore[assignment]
        lossy = LossyEngine(rank._engine)
        rank._loop._engine = lossy
        gc.collect()  # as a Worker does
        gc.freeze()
        threading.Thread(target=_obey, args=(pipe, lossy), daemon=True).start()
        pipe.send(("started", *((rank.inbox.endpoint, rank.card_digest) if rank.inbox is not None else ())))
        rank.run()
    except Exception as error:  # the process's top
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        os._exit(FAILED_EXIT_CODE)
    os._exit(0)


def _obey(pipe: Connection, lossy: LossyEngine) -> None:
    while pipe.recv() == "lose":
        lossy.loses.set()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
