"""One rank of test_one_shot_kernel: sums parts and finds best tokens in Triton's interpreter over inboxes in
a shared file, and says what came of it as a JSON line. Arguments: the file, rank, ranks, sums; 0 sums: one
rank stops waiting while another is late."""

import hashlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "1"  # read where the kernel is made

from workers.triton_kernels import one_shot

MAX_ROWS, MAX_WORDS, EPS = 3, 16, 1e-5
PATIENCE_S = 4.0
DTYPES = (torch.float16, torch.bfloat16)


def parts_of(number: int, num_ranks: int) -> list[torch.Tensor]:
    """Return all ranks' parts of one sum: 1 to 3 rows of an even width that need not be a power of two."""
    generator = torch.Generator().manual_seed(number)
    rows, size = 1 + number % MAX_ROWS, (32, 20, 8)[number % 3]
    return [torch.randn(rows, size, generator=generator).to(DTYPES[number % 2]) for _ in range(num_ranks)]


def stream_of(number: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number + 1000)
    x = torch.randn(like.shape, generator=generator).to(like.dtype)
    return x, torch.randn(like.shape[1], generator=generator).to(like.dtype)


def keys_of_ranks(number: int, num_ranks: int) -> torch.Tensor:
    """Return all ranks' keys of 1 to 3 rows, [ranks, rows], of either sign."""
    generator = torch.Generator().manual_seed(number + 2000)
    return torch.randint(-(1 << 62), 1 << 62, (num_ranks, 1 + number % MAX_ROWS), generator=generator)


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether values are within two units in the last place: the interpreter cuts bfloat16s off."""
    eps = torch.finfo(expected.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=2 * eps, atol=2 * eps)


def main(path: str, rank: int, num_ranks: int, num_sums: int) -> None:
    num_words = one_shot.inbox_bytes(num_ranks, MAX_ROWS, MAX_WORDS) // 8
    shared = torch.from_file(path, shared=True, size=num_ranks * num_words, dtype=torch.int64)
    inboxes = tuple(shared[peer * num_words :].data_ptr() for peer in range(num_ranks))
    # About to wrap: the counts of sums are of 32 bits.
    epochs = torch.full((MAX_ROWS,), 2**31 - 1 - num_sums // 2, dtype=torch.int32)
    is_over, has_left = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    memory = one_shot.OneShotMemory(rank, inboxes, epochs, MAX_WORDS, is_over, has_left, timeout_s=0.0)
    said = sum_and_leave(memory, Path(f"{path}.left")) if num_sums == 0 else sum_all(memory, num_sums)
    print(json.dumps(said), flush=True)


def sum_and_leave(memory: one_shot.OneShotMemory, has_left: Path) -> dict[str, object]:
    """Sum twice. Rank 1 waits for nobody, the last begins once it has left; then nobody waits for ever."""
    one_shot._LOOKS_AT_ONCE = type(one_shot._LOOKS_AT_ONCE)(4)
    rank, last = memory.rank, len(memory.inboxes) - 1
    if rank == 1:
        memory.is_over.fill_(1)
    while rank == last and not has_left.exists():
        time.sleep(0.02)
    part = torch.full((1, 8), float(rank + 1), dtype=torch.float16)
    first = one_shot.sum_parts(memory, part, pdl=False)
    said = {"first": first[0, 0].item(), "has_left": bool(memory.has_left)}
    if rank == 1:
        has_left.touch()
    end = threading.Timer(PATIENCE_S, lambda: memory.is_over.fill_(1))
    end.start()
    one_shot.sum_parts(memory, first, pdl=False)
    said["waited"] = bool(memory.is_over)
    end.join()
    return said


def sum_all(memory: one_shot.OneShotMemory, num_sums: int) -> dict[str, object]:
    """Make sums and find best tokens; hold each against torch's."""
    rank, num_ranks = memory.rank, len(memory.inboxes)
    pauses = random.Random(rank)
    wrong, digest = [], hashlib.sha256()
    for number in range(num_sums):
        time.sleep(pauses.choice((0.0, 0.0, 0.0, 0.02)))
        parts = parts_of(number, num_ranks)
        part, total = parts[rank].clone(), sum(each.float() for each in parts).to(parts[0].dtype)
        if number % 4 == 3:
            x, weight = stream_of(number, part)
            stream, normal = one_shot.sum_add_rms_norm(memory, x, part, weight, EPS, pdl=False)
            expected = (x.float() + total.float()).to(x.dtype)
            wide = expected.float()
            factor = 1.0 / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
            reference = (wide * factor).to(x.dtype) * weight
            right = is_close(stream, expected) and is_close(normal, reference)
            digest.update(normal.view(torch.int16).numpy())
        else:
            stream = one_shot.sum_parts(memory, part, pdl=False)
            right = is_close(stream, total)
        digest.update(stream.view(torch.int16).numpy())
        keys = keys_of_ranks(number, num_ranks)
        found = one_shot.best_ids(memory, keys[rank].clone(), pdl=False)
        right = right and torch.equal(found, 0xFFFFFFFF - (keys.amax(0) & 0xFFFFFFFF))
        if not right or not torch.equal(part, parts[rank]):
            wrong.append(number)
    if rank == 0:  # the others have left
        memory.is_over.fill_(1)
        one_shot.sum_parts(memory, parts_of(0, num_ranks)[rank], pdl=False)
        one_shot.best_ids(memory, keys_of_ranks(0, num_ranks)[rank], pdl=False)
        memory.epochs[0] -= 2
    return {"wrong": wrong, "epochs": memory.epochs.tolist(), "digest": digest.hexdigest()}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
