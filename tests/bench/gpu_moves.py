"""LOADs and SAVEs by themselves, and steady decodes beside them: mover, arena and board in one process."""

import gc
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cache_service.arena_files import SHARED_MEMORY
from tests.bench.gpu_shapes import shape_config
from tests.bench.kv_decode import Decode, DecodeSetup
from tests.bench.measuring import say
from tests.unit.tiers import Tier, eventually, keys
from workers.kvcache.cuda_copies import CudaPinning, CudaStreams, batch_copy
from workers.kvcache.cuda_page_mover import CudaPageMover
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.move_board import MOVE_CAPACITY, MoveBoard, MoveStatus

RATE = 4e9
"""Bytes a second of LOADs, and of SAVEs: what the multi-turn workload moves at most."""
PROMPT_LEN = 256
NUM_REQUESTS = 8
NUM_MOVED = 1_024
"""Pages of each kind: 2 GiB of the 8B shape's."""
ARMS = {"load_first": ("load",), "load": ("load",), "save": ("save",), "both": ("load", "save")}
"""load_first: no page was verified before."""
BUNDLE_KIB = (2_048, 360)
"""Of an 8B model's pages, and of SmolLM2's."""


def measure_moves(shape: str, options: dict[str, Any], *, is_quick: bool) -> dict[str, Any]:
    """Return GB/s and processor cores of each arm, and tier_tpot_penalty with what is behind it."""
    num_moved, num_stretches = (32, 2) if is_quick else (NUM_MOVED, 24)
    defaults = {"max_running_requests": NUM_REQUESTS, "max_tokens_per_step": NUM_REQUESTS * PROMPT_LEN}
    num_tokens = PROMPT_LEN + (2 * num_stretches + 4) * 10
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(Path(folder), shape, defaults | options)
        setup = DecodeSetup(
            config,
            rate=RATE,
            num_requests=NUM_REQUESTS,
            prompt_len=PROMPT_LEN,
            num_request_pages=NUM_REQUESTS * (num_tokens // config.page_size + 2),
            num_moved=num_moved,
            verify=config.verify_pages,
        )
        with Decode(setup) as decode:
            found: dict[str, Any] = {"move_gb": 0.0}
            for arm, kinds in ARMS.items():
                rounds = [decode.traffic.move_all(*kinds) for _ in range(1 if arm == "load_first" else 5)]
                num_bytes = rounds[0][0]
                seconds = statistics.median(seconds for _, seconds, _ in rounds)
                cores = statistics.median(cpu_s / seconds for _, seconds, cpu_s in rounds)
                found |= {
                    f"{arm}_gb_s": round(num_bytes / seconds / 1e9, 2),
                    f"{arm}_cores": round(cores, 2),
                    "move_gb": round(num_bytes / len(kinds) / 1e9, 2),
                }
                say(f"{arm}: {found[f'{arm}_gb_s']} GB/s, {found[f'{arm}_cores']} cores")
            figures = decode.measure(num_stretches)
    if torch.cuda.is_available() and config.device == "cuda":
        found |= measure_copies(is_quick=is_quick)
    found["tier_tpot_penalty"] = figures.pop("decode_penalty")
    return found | figures


def measure_copies(*, is_quick: bool) -> dict[str, Any]:
    """Return copies_*: GB/s and cores by page size, by how copies are enqueued, and by arm.

    `scattered` pages are no neighbours of each other: a copy for each.
    """
    found: dict[str, Any] = {}
    calls = {"batch": batch_copy(), "runs": None}
    for kib in BUNDLE_KIB:
        for copies, call in calls.items():
            if copies == "batch" and call is None:
                continue
            for order in ("neighbours", "scattered"):
                figures = _moved(kib, call, order == "scattered", (32 if is_quick else 1_024) << 20)
                found |= {f"copies_{kib}kib_{copies}_{order}_{arm}": each for arm, each in figures.items()}
                say(f"{kib} KiB, {copies}, {order}: {figures}")
    return found


def _moved(bundle_kib: int, call: Any, is_scattered: bool, total_bytes: int) -> dict[str, float]:
    layout = target_only(bundle_kib // 8, 16, 2, 64, "bfloat16")
    num_pages = min(total_bytes // layout.bundle_bytes, MOVE_CAPACITY)
    pool = KVPool(layout, num_pages, torch.device("cuda"))
    num_bytes = num_pages * layout.bundle_bytes
    pages, names = list(range(1, num_pages + 1)), keys(num_pages)
    if is_scattered:
        random.Random(0).shuffle(pages)
    make = partial(_mover, call)
    found: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder,
        Tier(
            Path(folder), [pool], num_slots=num_pages, make=make, board=MoveBoard.private(), verify="once"
        ) as tier,
    ):
        arena = tier.arena.spec
        eventually(lambda: tier.mover.stats.num_pinned_bytes() == arena.num_slots * arena.slot_bytes)
        tier.save(pages, names)  # warms up
        for _ in range(3):
            tier.store.clear()
            grants = tier.grant(num_pages)
            save = tier.save_op(pages, grants, names)
            _time(tier, "save", save, found, num_bytes)
            locations = tier.commit(grants, names)
            for arm in ("load_first", "load"):
                _time(tier, arm, tier.load_op(pages, locations, names), found, num_bytes)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def _mover(call: Any, pool: Any, mapped: Any, part: int, board: Any, **options: Any) -> CudaPageMover:
    streams = CudaStreams(pool, call)
    return CudaPageMover(pool, mapped, part, board, streams=streams, pinning=CudaPinning(), **options)


def _time(tier: Tier, name: str, op: Any, found: dict[str, list[float]], num_bytes: int) -> None:
    gc.collect()  # of what went before
    cpu_s, began_s = time.process_time(), time.perf_counter()
    tier.start(op)
    while tier.mover.num_in_flight:
        time.sleep(0.0005)
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    assert set(tier.outcome(op)) == {MoveStatus.DONE}, "a move failed"
    found.setdefault(f"{name}_gb_s", []).append(num_bytes / seconds / 1e9)
    found.setdefault(f"{name}_cores", []).append(cpu_s / seconds)
