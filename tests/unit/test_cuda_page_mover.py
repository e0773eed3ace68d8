"""CudaPageMover over a fake device: who waits for whom, what is pinned, what a failing device leaves."""

import threading

import pytest
import torch

from cache_service.arena_safety import ArenaSafety
from tests.unit.fake_copies import FakeCuda, FakePinning
from tests.unit.tiers import CPU, LAYOUT, Tier, eventually, keys, pool
from workers.kvcache import copy_lane
from workers.kvcache.arena_part import MappedArena
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.move_queue import MoveOfNoPageError, MoveTimeoutError
from workers.kvcache.moves import MoveInjection
from workers.move_board import MoveStatus

PENDING, ENQUEUED, DONE = MoveStatus.PENDING, MoveStatus.ENQUEUED, MoveStatus.DONE
TORN, IO = MoveStatus.FAILED_TORN, MoveStatus.FAILED_IO
BUNDLE = LAYOUT.bundle_bytes


@pytest.fixture
def build(tmp_path):
    """Make a tier over a fake device whose mover the test drives, or its own threads."""
    tiers = []

    def build(num_pages=12, cuda=None, is_driven=True, **options) -> tuple[Tier, FakeCuda]:
        cuda = cuda or FakeCuda()
        made = pool(0, num_pages)
        options = {"num_slots": 12, "piece_bytes": BUNDLE * 4, "is_driven": is_driven, **options}
        tier = Tier(tmp_path, [made], make=cuda, **options)
        tiers.append(tier)
        return tier, cuda

    yield build
    for tier in tiers:
        tier.close()


def drive(tier, cuda) -> None:
    """Let mover and device do all there is."""
    while any(
        [*(lane.advance() for lane in tier.mover.lanes), *(cuda.streams.step(k) for k in cuda.streams.ops)]
    ):
        pass


def saved(tier, cuda, pages, names):
    grants = tier.grant(len(pages))
    op = tier.save_op(pages, grants, names)
    tier.mover.start(op)
    drive(tier, cuda)
    assert tier.outcome(op) == [DONE] * len(pages)
    return tier.commit(grants, names)


def statuses(tier, op):
    return [tier.board.status(op.first_move + place) for place in range(len(op.pages))]


def test_a_step_waits_for_its_loads_on_the_device_and_the_host_goes_on(build) -> None:
    tier, cuda = build(cuda=FakeCuda(is_inline=False))
    op = tier.load_op([5, 6], saved(tier, cuda, [1, 2], keys(2)), keys(2))
    tier.mover.start(op)
    assert statuses(tier, op) == [PENDING] * 2
    tier.mover.lanes[0].advance()
    assert statuses(tier, op) == [ENQUEUED] * 2
    assert not tier.mover.comes_first(op.first_move)
    assert tier.mover.wait_for([6, 7]) is True
    assert tier.mover.comes_first(op.first_move + 1) and not tier.mover.comes_first(op.first_move)
    found = []
    cuda.streams.compute(lambda: found.append(torch.equal(tier.pools[0].data[6], tier.pools[0].data[2])))
    assert statuses(tier, op) == [ENQUEUED] * 2 and not found, "nothing has run yet"
    assert not cuda.streams.step("compute") or not cuda.streams.step("compute"), (
        "the step runs before its LOAD"
    )
    drive(tier, cuda)
    assert statuses(tier, op) == [DONE] * 2 and found == [True]
    assert tier.mover.wait_for([5, 6]) is False
    assert tier.mover.stats.num_waits == {"stream": 1, "host": 0}


def test_a_plan_that_comes_too_early_waits_on_the_host_and_is_counted(build) -> None:
    tier, cuda = build()
    op = tier.load_op([5], saved(tier, cuda, [1], keys(1)), keys(1))
    tier.mover.start(op)
    with pytest.raises(MoveTimeoutError, match=r"LOADs of pages \[5\] are not enqueued"):
        tier.mover.wait_for([5], timeout_s=0.01)
    timer = threading.Timer(0.05, tier.mover.lanes[0].advance)
    timer.start()
    assert tier.mover.wait_for([5]) is True
    timer.join()
    assert torch.equal(tier.pools[0].data[5], tier.pools[0].data[1])
    assert tier.mover.stats.num_waits == {"stream": 1, "host": 2}


def test_waiting_for_a_load_that_fails_ends_without_a_wait(build) -> None:
    tier, cuda = build()
    locations = saved(tier, cuda, [1], keys(1))
    tier.store.clear()
    tier.mover.start(tier.load_op([5], locations, keys(1)))
    threading.Timer(0.05, tier.mover.lanes[0].advance).start()
    assert tier.mover.wait_for([5]) is True
    assert tier.mover.stats.num_waits == {"stream": 0, "host": 1}


def test_copies_come_after_what_the_compute_stream_was_given_before(build) -> None:
    tier, cuda = build(cuda=FakeCuda(is_inline=False))
    pages = tier.pools[0].data
    cuda.streams.compute(lambda: pages[1].fill_(7))
    grants = tier.grant(1)
    op = tier.save_op([1], grants, keys(1))
    tier.mover.start(op)
    cuda.streams.compute(lambda: pages[2].fill_(9))
    tier.mover.lanes[1].advance()
    assert not cuda.streams.step("save"), "the copy runs before the page is written"
    drive(tier, cuda)
    assert bytes(tier.arena.bundle(grants[0].slot, 0)) == b"\x07" * BUNDLE


def test_pages_go_through_a_buffer_until_their_slots_are_pinned(build) -> None:
    tier, cuda = build()
    stats, pins = tier.mover.stats, tier.mover.pins()
    first = saved(tier, cuda, [1, 2, 3], keys(3))
    assert (stats.num_bounced["save"], stats.num_copies["save"], stats.num_pinned_bytes()) == (3, 3, 0)
    while pins.pin_next():
        pass
    assert stats.num_pinned_bytes() == 12 * BUNDLE == sum(cuda.pinning.pinned_at.values())
    op = tier.load_op([7, 8, 9], first, keys(3))
    tier.mover.start(op)
    drive(tier, cuda)
    assert tier.outcome(op) == [DONE] * 3 and stats.num_bounced["load"] == 0
    assert torch.equal(tier.pools[0].data[7:10], tier.pools[0].data[1:4])
    tier.mover.close()
    assert not cuda.pinning.pinned_at


def test_memory_that_cannot_be_pinned_is_copied_through_a_buffer_for_good(build) -> None:
    tier, cuda = build(num_pages=18, num_slots=24, cuda=FakeCuda(pinning=FakePinning(max_pieces=1)))
    pins = tier.mover.pins()
    assert [pins.pin_next() for _ in range(3)] == [True, False, False]
    assert pins.error == "no memory is left to be pinned"
    locations = saved(tier, cuda, list(range(1, 19)), keys(18))
    num_unpinned = sum(location.slot >= 16 for location in locations)
    assert tier.mover.stats.num_bounced["save"] == num_unpinned > 0
    for target, (location, name) in enumerate(zip(locations, keys(18), strict=True), start=1):
        before = tier.pools[0].data[target].clone()
        tier.pools[0].data[target] = 0
        op = tier.load_op([target], [location], [name])
        tier.mover.start(op)
        drive(tier, cuda)
        assert tier.outcome(op) == [DONE] and torch.equal(tier.pools[0].data[target], before)


def test_a_buffer_that_is_full_holds_moves_up_and_loses_none(build, monkeypatch) -> None:
    tier, cuda = build(cuda=FakeCuda(pinning=FakePinning(0)))
    for lane in tier.mover.lanes:
        monkeypatch.setattr(lane._bounce, "_free", [0, 1])
    op = tier.save_op(list(range(1, 9)), tier.grant(8), keys(8))
    tier.mover.start(op)
    for _ in range(3):
        tier.mover.lanes[1].advance()
    assert tier.mover.stats.num_bounced["save"] == 2
    drive(tier, cuda)
    assert tier.outcome(op) == [DONE] * 8
    assert sorted(tier.mover.lanes[1]._bounce._free) == [0, 1]


def test_neighbours_are_one_copy_unless_they_are_in_two_pieces(build) -> None:
    tier, cuda = build(num_slots=32)
    pins = tier.mover.pins()
    while pins.pin_next():
        pass
    per_piece = pins._slots_per_piece
    assert 32 > per_piece >= 4096 // BUNDLE
    grants = tier.grant(32)
    in_order = sorted(grants, key=lambda grant: grant.slot)[per_piece - 3 : per_piece + 3]
    op = tier.save_op([1, 2, 3, 4, 5, 7], in_order, keys(6))
    tier.mover.start(op)
    drive(tier, cuda)
    # pages 1 2 3 | 4 5 | 7: the bar is where one piece ends, and page 6 is not among them
    assert tier.outcome(op) == [DONE] * 6 and tier.mover.stats.num_copies["save"] == 3
    for page, grant in zip(op.pages, in_order, strict=True):
        assert bytes(tier.arena.bundle(grant.slot, 0)) == bytes(tier.pools[0].data[page])


def test_so_many_bytes_are_in_flight_and_no_more(build, monkeypatch) -> None:
    monkeypatch.setattr(copy_lane, "MAX_BYTES_IN_FLIGHT", 4 * BUNDLE)
    monkeypatch.setattr(copy_lane, "BATCH_BYTES", 2 * BUNDLE)
    tier, cuda = build()
    op = tier.load_op(list(range(5, 11)), saved(tier, cuda, list(range(1, 7)), keys(6)), keys(6))
    tier.mover.start(op)
    while tier.mover.lanes[0].advance():
        continue
    assert statuses(tier, op) == [ENQUEUED] * 4 + [PENDING] * 2
    drive(tier, cuda)
    assert tier.outcome(op) == [DONE] * 6


def test_a_copy_that_the_device_refuses_fails_and_leaves_nothing_behind(build) -> None:
    tier, cuda = build()
    op = tier.load_op([5, 6], saved(tier, cuda, [1, 2], keys(2)), keys(2))
    cuda.streams.fails_next_copy = True
    tier.mover.start(op)
    drive(tier, cuda)
    assert tier.outcome(op) == [IO] * 2
    assert not tier.arena.leases.any() and tier.mover.loading_pages() == []


def test_a_device_that_has_failed_fails_every_move_and_keeps_its_leases(build) -> None:
    """It may still copy, as far as anybody knows; the leases end with the process."""
    tier, cuda = build()
    locations = saved(tier, cuda, [1, 2, 3], keys(3))
    first = tier.load_op([5, 6], locations[:2], keys(3)[:2])
    tier.mover.start(first)
    tier.mover.lanes[0].advance()
    cuda.streams.has_failed = True
    then = tier.load_op([7], locations[2:], keys(3)[2:])
    tier.mover.start(then)
    for _ in range(3):
        tier.mover.lanes[0].advance()
    assert tier.outcome(first) == [IO] * 2 and tier.outcome(then) == [IO]
    assert tier.arena.leases.sum() == 2


class HeldSums:
    """Checksums that are there when the test says so, or who waits for them."""

    def __init__(self, checksums) -> None:
        self._checksums, self.held = checksums, []

    def begin(self, *arguments):
        sums = self._checksums.begin(*arguments)
        sums.is_there = False
        sums.query = lambda: sums.is_there
        sums.synchronize = lambda: setattr(sums, "is_there", True)
        self.held.append(sums)
        return sums


def hold_sums(tier, lane) -> HeldSums:
    held = HeldSums(tier.mover._checksums)
    lane._checks._checksums = held
    return held


def test_the_next_loads_are_read_while_others_are_copied(build, monkeypatch) -> None:
    monkeypatch.setattr(copy_lane, "MAX_BYTES_IN_FLIGHT", 4 * BUNDLE)
    monkeypatch.setattr(copy_lane, "BATCH_BYTES", 2 * BUNDLE)
    tier, cuda = build(num_pages=24)
    op = tier.load_op(range(11, 21), saved(tier, cuda, range(1, 11), keys(10)), keys(10))
    lane = tier.mover.lanes[0]
    held = hold_sums(tier, lane)
    tier.mover.start(op)
    while lane.advance():
        continue
    assert len(held.held) == 2, "as many bytes are read as may be copied, and no more"
    assert statuses(tier, op) == [PENDING] * 10 and lane.oldest is held.held[0]
    held.held[0].is_there = True
    while lane.advance():
        continue
    assert statuses(tier, op) == [ENQUEUED] * 2 + [PENDING] * 8 and len(held.held) == 3
    held.held[2].is_there = True
    assert lane.advance() is False, "a LOAD overtook another"
    for sums in held.held:
        sums.is_there = True
    while lane.advance():
        continue
    assert statuses(tier, op) == [ENQUEUED] * 4 + [PENDING] * 6, "only so much is in flight"
    assert lane.oldest is not held.held[2], "what is read waits for room, not for its checksums"


def test_saves_are_copied_while_others_are_read_and_end_once_they_are(build, monkeypatch) -> None:
    monkeypatch.setattr(copy_lane, "MAX_BYTES_IN_FLIGHT", 4 * BUNDLE)
    monkeypatch.setattr(copy_lane, "BATCH_BYTES", 2 * BUNDLE)
    tier, cuda = build()
    lane = tier.mover.lanes[1]
    held, grants = hold_sums(tier, lane), tier.grant(8)
    op = tier.save_op(range(1, 9), grants, keys(8))
    tier.mover.start(op)
    drive(tier, cuda)
    assert len(held.held) == 3 and tier.mover.stats.num_copies["save"] == 6, "a fourth waits"
    assert statuses(tier, op) == [PENDING] * 8
    assert [tier.arena.checksum(grant.slot, 0) for grant in grants] == [0] * 8
    for place in range(4):
        held.held[place].is_there = True
        drive(tier, cuda)
        assert statuses(tier, op) == [DONE] * (2 * place + 2) + [PENDING] * (6 - 2 * place)
    assert all(tier.arena.checksum(grant.slot, 0) for grant in grants)


class BrokenChecks:
    """Checks with a bug, in what comes before a copy or in what comes after."""

    def __init__(self, checks, broken: str) -> None:
        self.checks, self.broken = checks, broken

    def __getattr__(self, name):
        if name == self.broken:
            raise ZeroDivisionError(name)
        return getattr(self.checks, name)


@pytest.mark.parametrize("broken", ["before", "after"])
def test_a_bug_of_ours_fails_moves_and_lets_none_hang(build, broken) -> None:
    tier, _ = build(is_driven=False)
    locations = tier.save([1, 2], keys(2))
    lane = tier.mover.lanes[0]
    lane._checks = BrokenChecks(lane._checks, broken)
    for pages in ([5, 6], [7, 8]):
        assert tier.run(tier.load_op(pages, locations, keys(2))) == [IO] * 2
    assert tier.mover.num_in_flight == 0 and tier.mover.loading_pages() == []


def test_an_arena_of_other_pages_that_comes_late_fails_moves(build) -> None:
    tier, cuda = build()
    arenas = []
    other = KVPool(target_only(1, 8, 1, 8, "float32"), 4, CPU)
    mover = cuda(other, lambda: arenas[0] if arenas else None, 0, tier.board, is_driven=True)
    arenas.append(MappedArena(tier.arena, tier.leases[0]))
    op = tier.save_op([1], tier.grant(), keys(1))
    mover.start(op)
    assert mover.lanes[1].advance() is True
    assert tier.outcome(op) == [IO]
    mover.close()


def test_a_slot_is_leased_until_the_device_has_copied_it_whoever_wants_it(build) -> None:
    tier, cuda = build()
    (location,) = saved(tier, cuda, [1], keys(1))
    op = tier.load_op([5], [location], keys(1))
    tier.mover.start(op)
    tier.mover.lanes[0].advance()
    assert not tier.give_to_another(location.slot)
    drive(tier, cuda)
    assert tier.outcome(op) == [DONE]
    assert tier.give_to_another(location.slot)


def test_without_leases_the_evictor_tears_a_copy_and_that_shows(build) -> None:
    tier, cuda = build(safety=ArenaSafety(leases=False))
    (location,) = saved(tier, cuda, [1], keys(1))
    op = tier.load_op([5], [location], keys(1))
    tier.mover.start(op)
    tier.mover.lanes[0].advance()
    assert tier.give_to_another(location.slot)
    drive(tier, cuda)
    assert tier.outcome(op) == [TORN]


def test_closing_ends_every_move(build) -> None:
    began = threading.Event()
    injection = MoveInjection(0, during_copy=lambda move: began.set())
    tier, cuda = build(is_driven=False, injection=injection)
    cuda.streams.flows.clear()
    op = tier.save_op([1, 2, 3], tier.grant(3), keys(3))
    tier.mover.start(op)
    assert began.wait(20)
    threading.Timer(0.05, cuda.streams.flows.set).start()
    tier.mover.close()
    assert tier.outcome(op)[0] is DONE and set(tier.outcome(op)) <= {DONE, IO}
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith(("page-mover", "arena-pins", "page-checksum")) for name in names)
    assert not cuda.pinning.pinned_at


def test_threads_pin_the_arena_as_its_memory_comes(build) -> None:
    tier, cuda = build(is_driven=False, num_slots=64, num_threads=2)
    eventually(lambda: tier.mover.stats.num_pinned_bytes() == 64 * BUNDLE)
    assert len(cuda.pinning.pinned_at) == 4, "16 slots share a page of memory"
    locations = tier.save([1, 2, 3], keys(3))
    assert tier.run(tier.load_op([7, 8, 9], locations, keys(3))) == [DONE] * 3
    assert torch.equal(tier.pools[0].data[7:10], tier.pools[0].data[1:4])
    assert tier.mover.stats.num_bounced == {"save": 0, "load": 0}


@pytest.mark.parametrize("page", [-1, 0, 13])
def test_a_move_of_no_page_never_reaches_the_device(build, page) -> None:
    tier, cuda = build()
    (location,) = saved(tier, cuda, [1], keys(1))
    with pytest.raises(MoveOfNoPageError, match=r"allowed are 1 \.\. 12"):
        tier.mover.start(tier.load_op([2, page], [location] * 2, keys(1) * 2))
    assert tier.mover.num_in_flight == 0 and tier.mover.loading_pages() == []
