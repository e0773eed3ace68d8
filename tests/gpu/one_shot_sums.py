"""What a rank of test_one_shot_on_cuda does: sums of all shapes and best tokens, eager and replayed, held
against torch's; and what it does without a peer."""

import time
from random import Random

import torch

from workers.one_shot_sums import MAX_SENT_BYTES
from workers.parallel import TPGroup
from workers.triton_kernels import elementwise

SHAPES = [(1, 4096), (3, 576), (8, 4096), (64, 4096), (256, 4096), (16, 8192), (1, 8192), (5, 64)]
EPS = 1e-5
NUM_REPLAYS = 300
ALONE_S = 0.5


def check_sums(group: TPGroup, device: str) -> dict[str, int]:
    """Return how many sums were wrong, by kind; the ranks are late at random."""
    sums = group.one_shot
    assert sums is not None, "the ranks map each other's memory"
    late, wrong = Random(group.rank), {"sum": 0, "norm": 0, "best": 0, "replayed": 0}
    for number in range(200):
        rows, size = SHAPES[number % len(SHAPES)]
        shape = min(rows, MAX_SENT_BYTES // (2 * size * (group.size - 1))), size
        dtype = (torch.bfloat16, torch.float16)[number // len(SHAPES) % 2]
        parts = [_random(shape, dtype, number, rank) for rank in range(group.size)]
        own, total = parts[group.rank], sum(part.float() for part in parts).to(dtype)
        assert sums.takes(own)
        _be_late(late)
        keys = torch.stack([_random_keys(shape[0], number, rank) for rank in range(group.size)])
        best = sums.best_ids(keys[group.rank].contiguous())
        wrong["best"] += not torch.equal(best, 0xFFFFFFFF - (keys.amax(0) & 0xFFFFFFFF))
        if number % 2:
            wrong["sum"] += not torch.equal(sums.sum(own), total)
            continue
        x, weight = (_random(shape, dtype, number + 1_000, place) for place in (0, 1))
        stream, normal = sums.sum_add_rms_norm(x, own, weight[0].contiguous(), EPS)
        expected = elementwise.add_rms_norm(x, total, weight[0].contiguous(), EPS, pdl=False)
        wrong["norm"] += not (torch.equal(stream, expected[0]) and _is_near(normal, expected[1]))
    wrong["replayed"] = _replayed(group, late)
    return wrong


def sum_alone(group: TPGroup, device: str) -> dict[str, float]:
    """Rank 0 sums without the others; return how long it took to be over once it was ended."""
    sums = group.one_shot
    assert sums is not None
    part = torch.ones(8, 4096, dtype=torch.bfloat16, device="cuda")
    keys = torch.zeros(8, dtype=torch.int64, device="cuda")

    def sum_all() -> None:
        sums.sum_add_rms_norm(part, part, part[0].contiguous(), EPS)
        sums.best_ids(keys)

    sum_all()  # together; compiled
    torch.cuda.synchronize()
    if group.rank:
        time.sleep(4 * ALONE_S)  # who leaves ends rank 0's sums
        return {}
    is_over = torch.cuda.Event()
    sum_all()
    is_over.record()
    time.sleep(ALONE_S)
    assert not is_over.query(), "it waited for no part"
    began_s = time.perf_counter()
    sums.end()
    is_over.synchronize()
    return {"ended_after_s": time.perf_counter() - began_s}


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


def _random_keys(rows: int, number: int, rank: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(100 * number + rank)
    return torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator, device="cuda")


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
