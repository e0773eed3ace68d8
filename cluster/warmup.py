"""warm_up: starts a replica's ranks in processes of their own and lets them end, for `eyrie warmup`.

The next start on this machine finds compiled what it needs. Without Ray.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO

from pydantic import TypeAdapter

from cluster.config import ClusterConfig
from workers.config import WorkerConfig

POLL_S = 0.2
END_S = 10.0


class WarmupError(Exception):
    """A rank could not start; the message is fit for the user."""


@dataclass
class _Rank:
    process: "subprocess.Popen[bytes]"
    said: IO[bytes]
    """What it writes to stdout: why it fails. Its log goes to our stderr."""


def warm_up(config: ClusterConfig, progress: Callable[[str | None], None]) -> None:
    """Start every rank of one replica and wait until all have ended; raise WarmupError.

    `progress` hears what is waited for, then None.
    """
    worker = config.worker
    progress(f"building {worker.tp_size} rank{'s' * (worker.tp_size > 1)} of {worker.model}")
    with _ranks(worker) as ranks:
        deadline_s = time.monotonic() + config.start_timeout_s
        while any(rank.process.poll() is None for rank in ranks):
            _raise_first_failure(ranks)  # its peers would wait for it
            if time.monotonic() > deadline_s:
                raise WarmupError(
                    f"not built within start_timeout_s={config.start_timeout_s:g}; what has been compiled"
                    " is kept: repeat the command, or raise start_timeout_s"
                )
            time.sleep(POLL_S)
        _raise_first_failure(ranks)
    progress(None)


@contextmanager
def _ranks(worker: WorkerConfig) -> Iterator[list[_Rank]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = TypeAdapter(WorkerConfig).dump_json(worker)
    ranks: list[_Rank] = []
    with ExitStack() as files:
        try:
            for number in range(worker.tp_size):
                said = files.enter_context(tempfile.TemporaryFile())
                ranks.append(_Rank(_start(number, port, worker, options, said), said))
            yield ranks
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait(END_S)


def _start(
    number: int, port: int, worker: WorkerConfig, options: bytes, said: IO[bytes]
) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    if worker.device == "cuda":  # a card each, as Ray gives them
        cards = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(worker.tp_size)))
        environment["CUDA_VISIBLE_DEVICES"] = cards.split(",")[number % len(cards.split(","))]
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.warmup", str(number), str(port)],
        stdin=subprocess.PIPE,
        stdout=said,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(options)
    process.stdin.close()
    return process


def _raise_first_failure(ranks: list[_Rank]) -> None:
    for number, rank in enumerate(ranks):
        if rank.process.poll():
            rank.said.seek(0)
            reason = rank.said.read().decode(errors="replace").strip()
            ending = f"ended with {rank.process.returncode}; its log is above"
            raise WarmupError(reason or f"rank {number} {ending}")
