"""Ranks: real rank processes of a TP group, for the tests of workers.parallel. Others: on_ranks."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from workers.engine.vocabulary_shard import ids_of
from workers.parallel import TPGroup, listen

SCRIPT = Path(__file__).parent / "tensor_parallel_ranks.py"
ROOT = SCRIPT.parents[2]
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}
T = TypeVar("T")


def on_ranks(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    """Do `work` on every rank of a group, in threads; return the results in rank order."""
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    results: dict[int, T] = {}

    def run(rank: int) -> None:
        brought = listener if rank == 0 else None
        group = TPGroup.connect(rank, size, "127.0.0.1", port, timeout_s=30, listener=brought)
        results[rank] = work(group)
        group.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(size)]


class GlooSums:
    """RankSums over a group of the CPU: what OneShotSums computes, and how often it was asked."""

    def __init__(self, group: TPGroup, max_rows: int = 1 << 20) -> None:
        self.group, self.max_rows = group, max_rows
        self.num_sums = self.num_norms = 0

    def takes(self, part: torch.Tensor) -> bool:
        return part.dim() == 2 and part.shape[0] <= self.max_rows

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        total = part.clone()
        self.group.all_reduce(total)
        return total

    def sum_add_rms_norm(
        self, x: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_norms += 1
        total = part.clone()
        self.group.all_reduce(total)
        stream = x + total
        scale = torch.rsqrt(stream.float().pow(2).mean(-1, keepdim=True) + eps)
        return stream, weight * (stream.float() * scale).to(x.dtype)

    def end(self) -> None:
        """Do nothing: what waits here is gloo, which the group ends itself."""

    def takes_keys(self, keys: torch.Tensor) -> bool:
        return True

    def best_ids(self, keys: torch.Tensor) -> torch.Tensor:
        best = keys.clone()
        self.group.maximum(best)
        return ids_of(best)


class Ranks:
    """A process that forks groups of ranks and passes on what they say."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **QUIET},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: list[dict] = []

    def start(self, scenario: str, timeout_s: float = 30, device: str = "cpu", size: int = 2) -> list[dict]:
        """Start `size` ranks; return their fields, with their pids, when all have met."""
        assert self.process.stdin is not None
        group = {"scenario": scenario, "size": size, "timeout_s": timeout_s, "device": device}
        self.process.stdin.write(json.dumps(group) + "\n")
        self.process.stdin.flush()
        self.said = [{} for _ in range(size)]
        self.read_until(lambda: all("pid" in fields for fields in self.said))
        return self.said

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def finish(self) -> list[dict]:
        """Return all that the ranks said when all have ended."""
        self.read_until(lambda: all("status" in fields for fields in self.said))
        return self.said

    def read_until(self, is_enough: Callable[[], bool]) -> None:
        """Read lines until `is_enough`."""
        assert self.process.stdout is not None
        while not is_enough():
            line = self.process.stdout.readline()
            assert line, "the ranks' process ended"
            if not line.startswith("{"):  # NCCL's
                continue
            fields = json.loads(line)
            self.said[fields["rank"]].update(fields)
