"""SAVE and LOAD by a GPU's copy engines, over a real arena. Run by hand: pytest -m gpu tests/gpu -s

What the fakes of unit/test_cuda_page_mover.py take for granted is asked here of the real device: that copies
and waits keep the order of their events, and that pinned pieces serve. bench_gpu has how fast pages move.
"""

import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cache_service.page_records import Location
from tests.arena_host import ArenaHost
from tests.tier_answers import NUM_SLOTS, answers
from tests.unit.engine_plans import generate, tiny_engine
from tests.unit.test_checked_mode import two_requests
from tests.unit.test_engine_loads import PROMPT, finish
from tests.unit.tier_plans import TierLog
from tests.unit.tiers import LAYOUT, Tier, eventually, keys
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.cuda_copies import CudaPinning, CudaStreams, batch_copy
from workers.kvcache.cuda_page_mover import CudaPageMover
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import BundleLayout, target_only
from workers.kvcache.sanitizer import SanitizerError
from workers.move_board import MoveStatus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PENDING, ENQUEUED, DONE = MoveStatus.PENDING, MoveStatus.ENQUEUED, MoveStatus.DONE
TORN, IO = MoveStatus.FAILED_TORN, MoveStatus.FAILED_IO
LATE_CYCLES = 400_000_000
"""About 0.2 s of a stream's sleep."""
COPIES = ["batch", "runs"]


@pytest.fixture
def folder():
    """Where arenas are: not every file's memory can be pinned."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def refuse(address: int, num_bytes: int) -> None:
    raise RuntimeError("pinning is refused on purpose")


class Unpinnable(CudaPinning):
    """Memory that cannot be pinned in place."""

    pin = staticmethod(refuse)


def cuda_mover(pool, mapped, part, board, *, copies="batch", pinning=CudaPinning, **options) -> CudaPageMover:
    call = batch_copy() if copies == "batch" else None
    if copies == "batch" and call is None:
        pytest.skip("no cuda-bindings of CUDA 13: copies are made run by run")
    streams = CudaStreams(pool, call)
    return CudaPageMover(pool, mapped, part, board, streams=streams, pinning=pinning(), **options)


def cuda_pool(seed: int, num_pages: int = 12, layout: BundleLayout = LAYOUT) -> KVPool:
    made = KVPool(layout, num_pages, torch.device("cuda"))
    chance = torch.Generator("cuda").manual_seed(seed)
    made.data[1:].random_(0, 256, generator=chance)
    # Kernels that the tests use are loaded now: loading one waits for the device.
    made.data[:1].fill_(0)
    made.data[:2].clone()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    return made


def is_pinned(tier: Tier) -> bool:
    return tier.mover.stats.num_pinned_bytes() == tier.arena.spec.num_slots * tier.arena.spec.slot_bytes


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("pinning", [CudaPinning, Unpinnable])
def test_pages_come_back_byte_for_byte(folder, copies, pinning) -> None:
    pool = cuda_pool(0)
    before = pool.data.clone()
    make = partial(cuda_mover, copies=copies, pinning=pinning)
    with Tier(folder, [pool], num_slots=32, make=make) as tier:
        if pinning is CudaPinning:
            eventually(lambda: is_pinned(tier))
        locations = tier.save([1, 2, 3, 7], keys(4))
        for page, location in zip([1, 2, 3, 7], locations, strict=True):
            assert bytes(tier.arena.bundle(location.slot, 0)) == bytes(before[page].cpu().numpy())
        assert tier.run(tier.load_op([9, 10, 11, 4], locations, keys(4))) == [DONE] * 4
        torch.cuda.synchronize()
        assert torch.equal(pool.data[9:12], before[1:4]) and torch.equal(pool.data[4], before[7])
        assert torch.equal(pool.data[:4], before[:4]) and torch.equal(pool.data[5:9], before[5:9])
        stats = tier.mover.stats
        assert not tier.arena.leases.any()
        assert (stats.num_bounced["save"], stats.num_bounced["load"]) == (
            (4, 4) if pinning is Unpinnable else (0, 0)
        )
    # Everything is unpinned: the next process's pins find it free.
    with Tier(folder, [pool], num_slots=32, make=make) as tier:
        assert tier.run(tier.save_op([1], tier.grant(), keys(1))) == [DONE]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("fault", ["evicted", "flipped bit", "no such slot"])
def test_a_load_that_must_not_be_changes_no_page(folder, num_ranks, fault) -> None:
    """Two ranks of one process share a mapping, which only one of them can pin: the other bounces."""
    pools = [cuda_pool(seed) for seed in range(num_ranks)]
    with Tier(folder, pools, make=cuda_mover) as tier:
        (location,) = tier.save([1], keys(1))
        if fault == "evicted":
            tier.store.clear()
        elif fault == "flipped bit":
            tier.arena.bundle(location.slot, num_ranks - 1)[77] ^= 4
        else:
            location = Location(tier.arena.spec.num_slots + 3, location.epoch)
        before = [pool.data[5].clone() for pool in pools]
        (status,) = tier.run(tier.load_op([5], [location], keys(1)))
        assert status.is_failed
        assert torch.equal(pools[-1].data[5], before[-1])
        assert not tier.arena.leases.any()


@pytest.mark.parametrize("copies", COPIES)
def test_a_save_comes_after_a_write_that_its_stream_has_yet_to_do(folder, copies) -> None:
    pool = cuda_pool(0)
    with Tier(folder, [pool], make=partial(cuda_mover, copies=copies)) as tier:
        eventually(lambda: is_pinned(tier))
        torch.cuda._sleep(LATE_CYCLES)
        pool.data[1] = 7
        (grant,) = tier.grant()
        op = tier.save_op([1], [grant], keys(1))
        began_s = time.monotonic()
        tier.start(op)
        assert time.monotonic() - began_s < 0.05, "starting a SAVE waits for the device"
        assert tier.board.status(op.first_move) is PENDING
        assert tier.outcome(op) == [DONE]
        assert bytes(tier.arena.bundle(grant.slot, 0)) == b"\x07" * LAYOUT.bundle_bytes


@pytest.mark.parametrize("fences_moves", [True, False])
def test_a_load_comes_after_what_still_writes_its_page_or_is_overwritten(folder, fences_moves) -> None:
    pool = cuda_pool(0)
    mechanisms = Mechanisms(fences_moves=fences_moves)
    with Tier(folder, [pool], make=cuda_mover, mechanisms=mechanisms) as tier:
        locations = tier.save([1], keys(1))
        eventually(lambda: is_pinned(tier))
        torch.cuda._sleep(LATE_CYCLES)
        pool.data[5] = 9
        op = tier.load_op([5], locations, keys(1))
        tier.start(op)
        assert tier.outcome(op) == [DONE]
        torch.cuda.synchronize()
        assert torch.equal(pool.data[5], pool.data[1]) == fences_moves


def test_a_step_waits_on_the_device_and_the_host_does_not(folder) -> None:
    """The LOAD itself is late: its stream sleeps first, as behind other copies."""
    pool = cuda_pool(0)
    pool.data[5:7] = 0
    with Tier(folder, [pool], make=cuda_mover) as tier:
        eventually(lambda: is_pinned(tier))
        locations = tier.save([1, 2], keys(2))
        with torch.cuda.stream(tier.mover._streams._streams["load"]):
            torch.cuda._sleep(LATE_CYCLES)
        op = tier.load_op([5, 6], locations, keys(2))
        tier.start(op)
        eventually(lambda: tier.board.status(op.first_move + 1) is ENQUEUED)
        began_s = time.monotonic()
        unordered = pool.data[5].clone()
        assert tier.mover.wait_for([5, 6]) is True
        read = pool.data[5:7].clone()
        host_s = time.monotonic() - began_s
        assert tier.board.status(op.first_move) is ENQUEUED, "the LOAD was to be late"
        torch.cuda.current_stream().synchronize()
        assert torch.equal(read, pool.data[1:3])
        assert not unordered.any(), "what was read without a wait was read before the LOAD"
        assert host_s < 0.05, f"the host waited for {host_s:.3f} s"
        assert tier.outcome(op) == [DONE] * 2
        assert tier.mover.stats.num_waits == {"stream": 1, "host": 0}


def test_a_mark_that_is_not_recorded_holds_nobody_up(folder) -> None:
    """What `enqueues_before_waits` is for: told too early, a step reads the page before its LOAD."""
    pool = cuda_pool(0)
    pool.data[5] = 0
    mechanisms = Mechanisms(enqueues_before_waits=False)
    with Tier(folder, [pool], make=cuda_mover, mechanisms=mechanisms) as tier:
        eventually(lambda: is_pinned(tier))
        locations = tier.save([1], keys(1))
        with torch.cuda.stream(tier.mover._streams._streams["load"]):
            torch.cuda._sleep(LATE_CYCLES)
        op = tier.load_op([5], locations, keys(1))
        tier.start(op)
        eventually(lambda: tier.board.status(op.first_move) is ENQUEUED)
        tier.mover.wait_for([5])
        read = pool.data[5].clone()
        assert tier.outcome(op) == [DONE]
        assert not read.any()


@pytest.mark.parametrize("leases_whole_copies", [True, False])
def test_a_slot_goes_to_another_page_once_it_is_copied_or_the_copy_is_torn(
    folder, leases_whole_copies
) -> None:
    pool = cuda_pool(0)
    mechanisms = Mechanisms(leases_whole_copies=leases_whole_copies)
    with Tier(folder, [pool], num_slots=1, make=cuda_mover, mechanisms=mechanisms) as tier:
        eventually(lambda: is_pinned(tier))
        (location,) = tier.save([1], keys(1))
        with torch.cuda.stream(tier.mover._streams._streams["load"]):
            torch.cuda._sleep(LATE_CYCLES)
        op = tier.load_op([5], [location], keys(1))
        tier.start(op)
        eventually(lambda: tier.board.status(op.first_move) is ENQUEUED)
        assert tier.give_to_another(location.slot) != leases_whole_copies
        assert tier.outcome(op) == [DONE if leases_whole_copies else TORN]
        torch.cuda.synchronize()
        assert torch.equal(pool.data[5], pool.data[1]) == leases_whole_copies


def test_a_closing_mover_finishes_what_its_device_copies(folder) -> None:
    pool = cuda_pool(0)
    with Tier(folder, [pool], make=cuda_mover) as tier:
        eventually(lambda: is_pinned(tier))
        torch.cuda._sleep(LATE_CYCLES)
        pool.data[1] = 7
        (grant,) = tier.grant()
        op = tier.save_op([1], [grant], keys(1))
        tier.start(op)
        eventually(lambda: tier.mover.lanes[1].oldest is not None)
        tier.mover.close()
        assert tier.outcome(op) == [DONE]
        names = {thread.name for thread in threading.enumerate()}
        assert not any(name.startswith(("page-mover", "arena-pins", "page-checksum")) for name in names)


def test_the_sanitizer_sees_a_step_that_does_not_wait(folder) -> None:
    for mechanisms in (ALL_ON, Mechanisms(waits_for_loads=False)):
        engine = tiny_engine(mechanisms, device="cuda")
        with Tier(folder, [engine.pool], make=cuda_mover) as tier:
            engine.attach(tier.mover)
            log = TierLog(tier)
            log.open(0, PROMPT)
            log.run(engine, s0=17)
            log.keep(engine, 0)
            log.run(engine)
            log.open(1, PROMPT)
            with torch.cuda.stream(tier.mover._streams._streams["load"]):
                torch.cuda._sleep(LATE_CYCLES)
            op = log.load(1, 4)
            log.run(engine)
            eventually(lambda op=op, tier=tier: tier.board.status(op.first_move + 3) is ENQUEUED)
            log.use(1, op)
            if not mechanisms.waits_for_loads:
                with pytest.raises(SanitizerError, match=r"page_loaded: slot 1, .* found ENQUEUED"):
                    log.run(engine, s1=1)
                continue
            assert finish(engine, log, 1, 12) == generate(tiny_engine(), [PROMPT], 12)[0]
            engine.attach(None)


def test_checked_mode_catches_a_planted_index() -> None:
    engine, log = two_requests("cuda")
    log.run(engine, s0=1, s1=1)
    engine._table.rows[1, 0] = log.pages[0][2]
    with pytest.raises(SanitizerError, match=rf"staged_row: slot 1, page {log.pages[1][0]}"):
        log.run(engine, s0=1, s1=1)


@pytest.mark.parametrize("options", [{}, {"page_size": 16}, {"graphs": False}], ids=str)
def test_a_small_pool_with_a_tier_answers_as_without_one(tmp_path, options) -> None:
    options = {"device": "cuda", "kv_sanitizer": True, **options}
    if options.get("page_size") == 16:
        options["num_pages"] = 12
    alone, _ = answers(tmp_path / "alone", None, **options)
    with ArenaHost(NUM_SLOTS) as host:
        found, harness = answers(tmp_path / "tiered", host, **options)
    stats, tier = harness.mover.stats, harness.tier.stats
    print(
        f"\n{options}: loaded {tier.num_loaded_pages}, saved {tier.num_saved_pages} pages; waits"
        f" {dict(stats.num_waits)}, bounced {dict(stats.num_bounced)}, rows again"
        f" {harness.scheduler.stats.num_unproven_rows}, graph steps {dict(harness.engine.graph_steps)}"
    )
    assert found == alone
    assert tier.num_loaded_pages > 20 and stats.num_waits["host"] == 0


def test_launches_go_on_while_the_arena_is_pinned(folder) -> None:
    """Prints how long small launches take beside pinning, and without it."""
    layout = target_only(256, 16, 2, 64, "bfloat16")
    pool, small = cuda_pool(0, 2, layout), torch.zeros(1, device="cuda")

    def worst_launch(is_over) -> tuple[int, float]:
        num, worst_s = 0, 0.0
        while not is_over(num):
            began_s = time.monotonic()
            small.add_(1)
            worst_s = max(worst_s, time.monotonic() - began_s)
            num += 1
        return num, worst_s

    _, alone_s = worst_launch(lambda num: num >= 2000)
    with Tier(folder, [pool], num_slots=(1 << 30) // layout.bundle_bytes, make=cuda_mover) as tier:
        num, beside_s = worst_launch(lambda num: is_pinned(tier))
        print(f"\nworst launch: {alone_s * 1e3:.2f} ms alone, {beside_s * 1e3:.2f} ms in {num} while pinning")
    assert beside_s < 0.5
