"""What a rank of test_one_shot_on_cuda does: sums of all shapes, eager and replayed, held against torch's."""

import time
from random import Random

import torch

from workers.parallel import TPGroup
from workers.triton_kernels import elementwise

SHAPES = [(1, 4096), (3, 576), (8, 4096), (64, 4096), (256, 4096), (16, 8192), (1, 8192), (5, 64)]
EPS = 1e-5
NUM_REPLAYS = 300


def check_sums(group: TPGroup, device: str) -> dict[str, int]:
    """Return how many sums were wrong, by kind; the ranks are late at random."""
    sums = group.one_shot
    assert sums is not None, "the ranks map each other's memory"
    late, wrong = Random(group.rank), {"sum": 0, "norm": 0, "replayed": 0}
    for number in range(200):
        shape = SHAPES[number % len(SHAPES)]
        dtype = (torch.bfloat16, torch.float16)[number // len(SHAPES) % 2]
        parts = [_random(shape, dtype, number, rank) for rank in range(group.size)]
        own, total = parts[group.rank], sum(part.float() for part in parts).to(dtype)
        assert sums.takes(own)
        _be_late(late)
        if number % 2:
            wrong["sum"] += not torch.equal(sums.sum(own), total)
            continue
        x, weight = (_random(shape, dtype, number + 1_000, place) for place in (0, 1))
        stream, normal = sums.sum_add_rms_norm(x, own, weight[0].contiguous(), EPS)
        expected = elementwise.add_rms_norm(x, total, weight[0].contiguous(), EPS, pdl=False)
        wrong["norm"] += not (torch.equal(stream, expected[0]) and _is_near(normal, expected[1]))
    wrong["replayed"] = _replayed(group, late)
    return wrong


def _replayed(group: TPGroup, late: Random) -> int:
    """Count wrong replays of a graph of several sums, each of the one before."""
    sums = group.one_shot
    assert sums is not None
    part = torch.zeros(8, 4096, dtype=torch.bfloat16, device="cuda")

    def chain() -> torch.Tensor:
        found = part
        for _ in range(5):
            found = sums.sum(found * 0.5 + group.rank)
        return found

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = chain()
    num_wrong = 0
    for number in range(NUM_REPLAYS):
        given = [_random((8, 4096), torch.bfloat16, number, rank) for rank in range(group.size)]
        part.copy_(given[group.rank])
        _be_late(late)
        graph.replay()
        found = given
        for _ in range(5):
            total = sum((each * 0.5 + rank).float() for rank, each in enumerate(found)).bfloat16()
            found = [total] * group.size
        num_wrong += not torch.equal(out, found[0])
    return num_wrong


def _random(shape: tuple[int, int], dtype: torch.dtype, number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(100 * number + rank)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def _be_late(late: Random) -> None:
    """Now and then the host is, or the device."""
    match late.randrange(8):
        case 0:
            time.sleep(0.001)
        case 1:
            torch.cuda._sleep(late.randrange(1_000_000))


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=2 * eps, atol=2 * eps)
