"""How long one all-reduce of a group takes, by the bytes that are summed: replayed from a graph on CUDA."""

import multiprocessing
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch

from tests.bench.follower_ranks import HOST, START_TIMEOUT_S, environment, visible_cards
from tests.bench.measuring import say
from workers.one_shot_sums import RankSums
from workers.parallel import TPGroup

SIZES = [1 << power for power in range(10, 27)]
"""1 KiB to 64 MiB"""
QUICK_SIZES = [1 << 10, 1 << 14]
NUM_CALLS = 32
"""Of one graph"""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Failure:
    """What a rank says instead of its result."""

    text: str


def measure_all_reduce(tp_size: int, device: str, *, is_quick: bool) -> dict[str, Any]:
    """Return microseconds of one call by way and bytes: {"nccl": {"1024": 9.1, ...}, ...}."""
    sizes, num_rounds = (QUICK_SIZES, 3) if is_quick else (SIZES, 20)
    return on_ranks(tp_size, device, _sum_all, sizes, num_rounds)[0]


def on_ranks(tp_size: int, device: str, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work` returned on each rank of a group, each in a process, on CUDA with a card of its own;
    it is given the group, the device and `arguments`."""
    context = multiprocessing.get_context("spawn")
    cards = visible_cards(tp_size)
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(tp_size):
        mine, theirs = context.Pipe()
        given = (theirs, rank, tp_size, port, device, work, arguments)
        process = context.Process(target=_be_rank, args=given, daemon=True)
        with environment({"CUDA_VISIBLE_DEVICES": cards[rank]} if device == "cuda" else {}):
            process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    try:
        found = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(START_TIMEOUT_S), f"rank {rank} says nothing"
            told = pipe.recv()
            assert not isinstance(told, Failure), f"rank {rank}: {told.text}"
            found.append(told)
        return found
    finally:
        for process in processes:
            process.join(10.0)
            process.kill()


def _be_rank(
    pipe: Connection,
    rank: int,
    tp_size: int,
    port: int,
    device: Literal["cpu", "cuda"],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    group = TPGroup.connect(
        rank, tp_size, HOST, port, timeout_s=TIMEOUT_S, meeting_timeout_s=START_TIMEOUT_S, device=device
    )
    try:
        pipe.send(work(group, device, *arguments))
    except Exception:  # the process's top
        pipe.send(Failure(traceback.format_exc()))
    group.close()


def _sum_all(group: TPGroup, device: str, sizes: list[int], num_rounds: int) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        part = _part(size, device)
        ways: dict[str, Callable[[], object]] = {"nccl" if device == "cuda" else "gloo": _summer(group, part)}
        if group.one_shot is not None and group.one_shot.takes(part):
            ways |= _own_ways(group.one_shot, part)
        for way, call in ways.items():
            with _many(call, device) as run:
                us = 1e6 * _seconds(run, group, device, num_rounds)
                found.setdefault(way, {})[str(size)] = round(us, 2)
        if group.rank == 0:
            say(f"{size} bytes: { {way: by_size.get(str(size)) for way, by_size in found.items()} }")
    return found


def _own_ways(one_shot: RankSums, part: torch.Tensor) -> dict[str, Callable[[], object]]:
    x, weight = torch.zeros_like(part), torch.ones_like(part[0])
    return {
        "one_shot": lambda: one_shot.sum(part),
        "one_shot_norm": lambda: one_shot.sum_add_rms_norm(x, part, weight, 1e-5),
    }


def _part(size: int, device: str) -> torch.Tensor:
    """Return random rows of as many bytes, of 8 KiB as those of an 8B model where there are as many."""
    columns = min(size // 2, 4_096)
    return torch.randn(size // (2 * columns), columns, device=device).bfloat16()


def _summer(group: TPGroup, part: torch.Tensor) -> Callable[[], object]:
    own = part.clone()
    return lambda: group.all_reduce(own)


@contextmanager
def _many(call: Callable[[], object], device: str) -> Iterator[Callable[[], None]]:
    """Yield what calls NUM_CALLS times, one after another."""
    if device == "cpu":
        yield lambda: [call() for _ in range(NUM_CALLS)] and None
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(NUM_CALLS):
            call()
    yield graph.replay
    graph.reset()


def _seconds(run: Callable[[], None], group: TPGroup, device: str, num_rounds: int) -> float:
    """Return the median time of one call; the ranks begin each round together."""
    times = []
    together = torch.zeros(1, device=device)
    for _ in range(num_rounds + 2):
        group.all_reduce(together)
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1000 / NUM_CALLS)
        else:
            began_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - began_s) / NUM_CALLS)
    return statistics.median(times[2:])
