"""Followers: the processes of a TP group's ranks beyond the first, for tests that run several ranks."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Self

import torch

from tests.arena_host import ArenaPlace
from tests.node_host import NodePlace
from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.parallel import TPGroup, listen
from workers.step_loop import END_OF_LOG, FollowerLoop

HOST = "127.0.0.1"
TIMEOUT_S = 60.0


class Followers:
    """Spawned processes for the ranks beyond the first; kept, they serve one harness after the other."""

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for _ in range(num_ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=follow, args=(theirs,), daemon=True)
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
            process.join(TIMEOUT_S)
            assert process.exitcode == 0, f"a follower ended with {process.exitcode}"

    @contextmanager
    def group(self, config: WorkerConfig, place: ArenaPlace | NodePlace | None = None) -> Iterator[TPGroup]:
        """Yield rank 0's membership of a group with all followers, who must see no error.

        At `place` is their arena, if they have one.
        """
        listener = listen(HOST)
        port = listener.getsockname()[1]
        for rank, pipe in enumerate(self._pipes, start=1):
            pipe.send((config, rank, port, place))
        group = TPGroup.connect(0, config.tp_size, HOST, port, timeout_s=TIMEOUT_S, listener=listener)
        try:
            yield group
            group.broadcast_plan(END_OF_LOG)
            failures = [pipe.recv() if pipe.poll(TIMEOUT_S) else "silent" for pipe in self._pipes]
            assert not any(failures), f"followers failed: {failures}"
        finally:
            group.close()


def follow(pipe: Connection) -> None:
    """Be a rank of one group after the other; tell the parent what went wrong, None if nothing."""
    while True:
        try:
            config, rank, port, place = pipe.recv()
        except EOFError:
            return
        torch.set_num_threads(max(config.num_threads, 1))
        group = TPGroup.connect(rank, config.tp_size, HOST, port, timeout_s=TIMEOUT_S)
        failure: str | None = None
        try:
            engine = Engine(config, load_card(config.model), group)
            arena, mover = place.attach(engine, group) if place is not None else (None, None)
            FollowerLoop(engine, group, silence_s=TIMEOUT_S, depth=config.depth).run()
            if arena is not None and mover is not None:
                mover.close()
                arena.close()
            engine.close()
        except Exception as error:  # the process's top
            failure = f"{type(error).__name__}: {error}"
        pipe.send(failure)
        group.close()
