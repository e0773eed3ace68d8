"""Groups of rank processes for test_parallel: reads one group a line on stdin, forks its ranks (torch is
imported once), prints what they say as JSON lines and, last, how each ended."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from workers.parallel import TPGroup, TPGroupError, listen


def say(rank: int, **fields) -> None:
    os.write(1, (json.dumps({"rank": rank, **fields}) + "\n").encode())  # whole lines: ranks share the pipe


def work(group: TPGroup, device: str) -> None:
    """Every call once."""
    tensor = torch.full((2, 3), group.rank + 1.0, dtype=torch.bfloat16, device=device)
    group.all_reduce(tensor)
    say(group.rank, sum=tensor.tolist())
    gathered = group.all_gather(torch.tensor([group.rank, 10.0 + group.rank], device=device))
    say(group.rank, gathered=gathered.tolist())
    sizes = [0, 1, 100_000]
    if group.rank == 0:
        for size in sizes:
            group.broadcast_plan(b"\x07" * size)
    else:
        plans = [group.has_plan(20) and group.receive_plan(20) == b"\x07" * size for size in sizes]
        say(group.rank, plans=plans, more=group.has_plan(0.0))
    group.board.publish(3 + group.rank)
    group.all_reduce(tensor)  # both have published
    say(group.rank, counts=group.board.counts(), minimum=group.board.minimum())
    maps = Path("/proc/self/maps").read_text().splitlines()
    if device == "cuda":
        say(group.rank, graphed=sum_in_a_graph(group))
    say(group.rank, boards=[line.split(maxsplit=5)[5] for line in maps if "eyrie-board" in line])


def sum_in_a_graph(group: TPGroup) -> list[float]:
    """Capture an all_reduce and replay it over two inputs."""
    tensor = torch.zeros(2, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        group.all_reduce(tensor)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        group.all_reduce(tensor)
    sums = []
    for value in (1.0, 5.0):
        tensor.fill_(value + group.rank)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        sums.append(tensor[0].item())
    return sums


def reduce_until_error(group: TPGroup, device: str) -> None:
    tensor = torch.zeros(8, device=device)
    while True:
        group.all_reduce(tensor)


def follow_until_error(group: TPGroup, device: str) -> None:
    if group.rank == 0:
        time.sleep(60)
    while True:
        group.receive_plan(60)


def lead_until_error(group: TPGroup, device: str) -> None:
    if group.rank > 0:
        time.sleep(60)
    while True:
        group.broadcast_plan(b"plan")
        time.sleep(0.01)


SCENARIOS = {
    function.__name__: function
    for function in (work, reduce_until_error, follow_until_error, lead_until_error)
}


def run_rank(scenario: str, rank: int, size: int, timeout_s: float, device: str, listener) -> None:
    port = listener.getsockname()[1]
    if device == "cuda":
        torch.cuda.set_device(rank)
    group = TPGroup.connect(
        rank,
        size,
        "127.0.0.1",
        port,
        timeout_s=timeout_s,
        meeting_timeout_s=60,
        device=device,
        listener=listener if rank == 0 else None,
    )
    say(rank, pid=os.getpid())
    started = time.monotonic()
    try:
        SCENARIOS[scenario](group, device)
    except TPGroupError as error:
        say(rank, error=type(error).__name__, message=str(error), after_s=time.monotonic() - started)
    finally:
        group.close()
        group.close()
    say(rank, closed=True)


def run_group(scenario: str, size: int, timeout_s: float, device: str) -> None:
    listener = listen("127.0.0.1")
    ranks = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(scenario, rank, size, timeout_s, device, listener)
            finally:
                os._exit(0)
        ranks[pid] = rank
    listener.close()
    while ranks:
        pid, status = os.wait()
        say(ranks.pop(pid), status=status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        run_group(**json.loads(line))
