"""PageMover: SAVE and LOAD between a pool and a real arena, and every way in which they fail."""

import threading
from functools import partial

import numpy
import pytest
import torch

from cache_service.arena_format import INCARNATION_WORD
from cache_service.arena_safety import ArenaSafety
from cache_service.page_records import CommitStatus, Entry, Grant, Location
from tests.unit.arenas import key
from tests.unit.fake_copies import FakeCuda
from tests.unit.tiers import CPU, GROUP, LAYOUT, Tier, eventually, keys, pool
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.arena_part import MappedArena, MoverError
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.move_queue import MoveOfNoPageError, MoveTimeoutError
from workers.kvcache.moves import MoveInjection
from workers.kvcache.page_mover import PIECE_BYTES, PageMover
from workers.move_board import MoveStatus

ENQUEUED, DONE = MoveStatus.ENQUEUED, MoveStatus.DONE
STALE, CORRUPT = MoveStatus.FAILED_STALE, MoveStatus.FAILED_CORRUPT
TORN, IO = MoveStatus.FAILED_TORN, MoveStatus.FAILED_IO


@pytest.fixture(params=["cpu", "device"])
def make(request):
    """A mover that copies by itself, and one that has a device copy."""
    return PageMover if request.param == "cpu" else FakeCuda()


class Watch:
    """Stops moves in the middle of their copies, and remembers what it saw there."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.stopped: list[int] = []

    def __call__(self, move) -> None:
        self.stopped.append(move.number)
        assert self.may_go_on.wait(20)

    @property
    def injection(self) -> MoveInjection:
        return MoveInjection(0, during_copy=self)


def copies(pools, source, target) -> bool:
    return all(torch.equal(each.data[source], each.data[target]) for each in pools)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("verify", ["always", "once"])
def test_a_page_comes_back_byte_for_byte_into_another_page_on_every_rank(
    tmp_path, num_ranks, verify, make
) -> None:
    pools = [pool(seed) for seed in range(num_ranks)]
    before = [each.data.clone() for each in pools]
    with Tier(tmp_path, pools, make=make, verify=verify) as tier:
        locations = tier.save([1, 2, 3], keys(3))
        assert all(torch.equal(each.data, old) for each, old in zip(pools, before, strict=True))
        for targets in ([7, 8, 9], [10, 11, 12]):
            assert tier.run(tier.load_op(targets, locations, keys(3))) == [DONE] * 3
        for each, old in zip(pools, before, strict=True):
            assert torch.equal(each.data[7:10], old[1:4])
            assert torch.equal(each.data[10:13], old[1:4])
            assert torch.equal(each.data[:7], old[:7])
        for part, mover in enumerate(tier.movers):
            assert +mover.stats.counts == {("save", DONE): 3, ("load", DONE): 6}
            assert mover.stats.num_bytes == {"save": 3 * 256, "load": 6 * 256}
            assert mover.num_in_flight == 0
            assert tier.leases[part].num_leased == 0
        assert not tier.arena.leases.any()
        tier.store.check()


def test_a_page_of_several_pieces_comes_back_whole(tmp_path) -> None:
    layout = target_only(15, 16, 5, 64, "float32")
    assert layout.bundle_bytes > PIECE_BYTES and layout.bundle_bytes % PIECE_BYTES
    large = KVPool(layout, 2, CPU)
    large.data[1] = torch.from_numpy(
        numpy.random.default_rng(0).integers(0, 256, layout.bundle_bytes, numpy.uint8)
    )
    with Tier(tmp_path, [large]) as tier:
        assert tier.run(tier.load_op([2], tier.save([1], keys(1)), keys(1))) == [DONE]
        assert copies([large], 1, 2)


def test_one_bad_page_of_many_that_are_moved_together_takes_no_other_with_it(tmp_path, make) -> None:
    pools = [pool(0)]
    with Tier(tmp_path, pools, make=make) as tier:
        locations = tier.save([1, 2, 3, 4, 5], keys(5))
        tier.arena.bundle(locations[2].slot, 0)[77] ^= 4
        locations[3] = Location(locations[3].slot, locations[3].epoch - 2)
        statuses = tier.run(tier.load_op([6, 7, 8, 9, 10], locations, keys(5)))
        assert statuses == [DONE, DONE, CORRUPT, STALE, DONE]
        assert all(copies(pools, source, source + 5) for source in (1, 2, 5))
        assert not any(copies(pools, source, source + 5) for source in (3, 4))


def test_ranks_parts_are_told_apart(tmp_path, make) -> None:
    """Rank 1's bytes in rank 0's place are wrong bytes."""
    pools = [pool(seed) for seed in range(2)]
    with Tier(tmp_path, pools, make=make) as tier:
        (location,) = tier.save([1], keys(1))
        first, second = (tier.arena.bundle(location.slot, part) for part in range(2))
        first[:], second[:] = bytes(second), bytes(first)
        sums = [tier.arena.checksum(location.slot, part) for part in range(2)]
        for part in range(2):
            tier.arena.set_checksum(location.slot, part, sums[1 - part])
        assert tier.run(tier.load_op([5], [location], keys(1))) == [CORRUPT]


def one_load(tier, location, page_key) -> tuple[list[MoveStatus], bool]:
    """Load into page 5 of every rank; what the last rank told, and whether its page changed."""
    before = tier.pools[-1].data[5].clone()
    op = tier.load_op([5], [location], [page_key])
    tier.run(op)
    assert not tier.arena.leases.any(), "the lease outlives its move"
    return tier.boards[-1].told[op.first_move], not torch.equal(tier.pools[-1].data[5], before)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("none", [ENQUEUED, DONE]),
        ("stale epoch", [STALE]),
        ("wrong key", [STALE]),
        ("evicted", [STALE]),
        ("given to another", [STALE]),
        ("not yet committed", [STALE]),
        ("flipped bit", [CORRUPT]),
        ("flipped bit in the checksum", [CORRUPT]),
        ("no such slot", [IO]),
    ],
)
def test_a_load_that_must_not_be_is_never_enqueued(tmp_path, num_ranks, fault, expected, make) -> None:
    with Tier(tmp_path, [pool(seed) for seed in range(num_ranks)], make=make) as tier:
        (location,) = tier.save([1], keys(1))
        page_key, part = keys(1)[0], num_ranks - 1
        if fault == "stale epoch":
            location = Location(location.slot, location.epoch - 2)
        elif fault == "wrong key":
            page_key = key("other tokens")
        elif fault == "evicted":
            assert tier.store.clear() == 1
        elif fault == "given to another":
            assert tier.give_to_another(location.slot)
        elif fault == "not yet committed":
            (grant,) = tier.grant()
            assert tier.run(tier.save_op([2], [grant], keys(2)[1:])) == [DONE]
            location, page_key = Location(grant.slot, grant.epoch + 1), keys(2)[1]
        elif fault == "flipped bit":
            tier.arena.bundle(location.slot, part)[77] ^= 4
        elif fault == "flipped bit in the checksum":
            tier.arena.set_checksum(location.slot, part, tier.arena.checksum(location.slot, part) ^ 4)
        elif fault == "no such slot":
            location = Location(tier.arena.spec.num_slots + 3, location.epoch)
        told, changed = one_load(tier, location, page_key)
        assert told == expected
        assert changed == (fault == "none")


def test_a_flipped_bit_is_loaded_where_loads_are_not_verified(tmp_path, make) -> None:
    with Tier(tmp_path, [pool(0)], make=make, mechanisms=Mechanisms(verifies_loads=False)) as tier:
        (location,) = tier.save([1], keys(1))
        tier.arena.bundle(location.slot, 0)[77] ^= 4
        assert one_load(tier, location, keys(1)[0]) == ([ENQUEUED, DONE], True)


def test_once_verified_is_enough_only_by_that_policy_and_for_that_epoch(tmp_path, make) -> None:
    outcomes = {}
    for verify in ("always", "once"):
        with Tier(tmp_path, [pool(0)], make=make, verify=verify) as tier:
            (location,) = tier.save([1], keys(1))
            first = tier.run(tier.load_op([5], [location], keys(1)))
            tier.arena.bundle(location.slot, 0)[77] ^= 4
            again = tier.run(tier.load_op([6], [location], keys(1)))
            tier.store.drop(location, "test")
            (location,) = tier.save([1], keys(1))
            tier.arena.bundle(location.slot, 0)[77] ^= 4
            outcomes[verify] = first + again + tier.run(tier.load_op([7], [location], keys(1)))
    assert outcomes == {"always": [DONE, CORRUPT, CORRUPT], "once": [DONE, DONE, CORRUPT]}


def test_pages_are_verified_anew_once_another_server_has_the_arena(tmp_path, make) -> None:
    with Tier(tmp_path, [pool(0)], make=make, verify="once") as tier:
        (location,) = tier.save([1], keys(1))
        assert tier.run(tier.load_op([5], [location], keys(1))) == [DONE]
        tier.arena.bundle(location.slot, 0)[77] ^= 4
        tier.arena.set_word(INCARNATION_WORD, tier.arena.incarnation + 1)
        assert tier.run(tier.load_op([6], [location], keys(1))) == [CORRUPT]


@pytest.mark.parametrize("leases", [True, False])
def test_only_without_leases_does_the_evictor_tear_a_copy_and_then_it_shows(tmp_path, leases) -> None:
    reused: list[bool] = []
    injection = MoveInjection(0, during_copy=lambda move: during(move))
    pools = [pool(0)]
    with Tier(tmp_path, pools, safety=ArenaSafety(leases=leases), injection=injection) as tier:

        def during(move):
            if move.kind == "load":
                reused.append(tier.give_to_another(move.slot))

        (location,) = tier.save([1], keys(1))
        assert one_load(tier, location, keys(1)[0]) == (
            [ENQUEUED, DONE if leases else TORN],
            True,
        )
        assert reused == [not leases]
        half = LAYOUT.bundle_bytes // 2
        assert torch.equal(pools[0].data[5, :half], pools[0].data[1, :half])
        assert bytes(pools[0].data[5, half:]) == (
            b"\x55" * half if not leases else bytes(pools[0].data[1, half:])
        )


def test_a_dropped_page_s_slot_waits_for_the_copy_under_way(tmp_path, make) -> None:
    watch, pools = Watch(), [pool(0)]
    with Tier(tmp_path, pools, make=make, num_slots=1, injection=watch.injection) as tier:
        watch.may_go_on.set()
        (location,) = tier.save([1], keys(1))
        watch.may_go_on.clear()
        op = tier.load_op([5], [location], keys(1))
        tier.start(op)
        eventually(lambda: op.first_move in watch.stopped)
        assert tier.store.clear() == 1
        assert (tier.store.num_draining, tier.store.grant(GROUP, 1)) == (1, [])
        watch.may_go_on.set()
        assert tier.outcome(op) == [DONE]
        assert copies(pools, 1, 5)
        assert len(tier.grant()) == 1


@pytest.mark.parametrize("fault", ["another epoch", "even epoch", "committed", "taken back"])
def test_a_save_without_its_grant_writes_nothing(tmp_path, fault, make) -> None:
    with Tier(tmp_path, [pool(0)], make=make) as tier:
        (grant,) = tier.grant()
        if fault == "another epoch":
            grant = Grant(grant.slot, grant.epoch + 2)
        elif fault == "even epoch":
            grant = Grant(grant.slot, grant.epoch + 1)
        elif fault == "committed":
            tier.run(tier.save_op([2], [grant], keys(1)))
            tier.commit([grant], keys(1))
        else:
            tier.store.reclaim(GROUP)
        before = bytes(tier.arena.slot_data(grant.slot))
        assert tier.run(tier.save_op([1], [grant], keys(1))) == [STALE]
        assert bytes(tier.arena.slot_data(grant.slot)) == before


def test_a_grant_that_ends_within_a_save_leaves_no_checksum(tmp_path, make) -> None:
    injection = MoveInjection(0, during_copy=lambda move: tier.store.reclaim(GROUP))
    with Tier(tmp_path, [pool(0)], make=make, injection=injection) as tier:
        (grant,) = tier.grant()
        assert tier.run(tier.save_op([1], [grant], keys(1))) == [TORN]
        assert tier.arena.checksum(grant.slot, 0) == 0


def test_a_slot_is_committed_only_once_every_rank_has_saved(tmp_path, make) -> None:
    with Tier(tmp_path, [pool(0), pool(1)], make=make) as tier:
        (grant,) = tier.grant()
        op = tier.save_op([1], [grant], keys(1))
        tier.movers[1].start(op)
        eventually(lambda: tier.boards[1].own_status(op.first_move) is DONE)
        assert (tier.board.status(op.first_move), tier.board.is_over(op.first_move)) == (
            MoveStatus.PENDING,
            False,
        )
        (result,) = tier.store.commit(GROUP, [Entry(grant.slot, grant.epoch, keys(1)[0], None, 4)])
        assert result.status is CommitStatus.INCOMPLETE


def test_waiting_ends_with_the_load_and_not_before(tmp_path) -> None:
    watch, pools = Watch(), [pool(0)]
    with Tier(tmp_path, pools, injection=watch.injection) as tier:
        watch.may_go_on.set()
        locations = tier.save([1, 2], keys(2))
        assert tier.mover.wait_for([1, 2, 5]) is False
        watch.may_go_on.clear()
        op = tier.load_op([5, 6], locations, keys(2))
        tier.start(op)
        eventually(lambda: tier.board.status(op.first_move) is ENQUEUED)
        assert sorted(tier.mover.loading_pages()) == [5, 6]
        assert tier.mover.wait_for([1, 2, 7]) is False
        with pytest.raises(MoveTimeoutError, match=r"LOADs \[3\]"):
            tier.mover.wait_for([4, 5], timeout_s=0.01)
        threading.Timer(0.05, watch.may_go_on.set).start()
        assert tier.mover.wait_for([5, 6]) is True
        assert [tier.board.status(move) for move in (3, 4)] == [DONE, DONE]
        assert copies(pools, 1, 5) and copies(pools, 2, 6)
        assert tier.mover.loading_pages() == []


def test_starting_never_waits_for_a_copy(tmp_path) -> None:
    watch = Watch()
    with Tier(tmp_path, [pool(0)], injection=watch.injection, num_threads=1) as tier:
        grants = tier.grant(4)
        op = tier.save_op([1, 2, 3, 4], grants, keys(4))
        tier.start(op)  # its one thread hangs in the first copy
        eventually(lambda: watch.stopped)
        tier.start(tier.save_op([5], tier.grant(), [key("more")]))
        assert tier.mover.num_in_flight == 5
        watch.may_go_on.set()
        assert tier.outcome(op) == [DONE] * 4


def test_loads_go_before_saves_that_wait(tmp_path) -> None:
    watch = Watch()
    with Tier(tmp_path, [pool(0)], injection=watch.injection, num_threads=1) as tier:
        watch.may_go_on.set()
        locations = tier.save([1], keys(1))
        watch.may_go_on.clear()
        tier.start(tier.save_op([2, 3], tier.grant(2), keys(3)[1:]))
        eventually(lambda: len(watch.stopped) == 2)
        load = tier.load_op([5], locations, keys(1))
        tier.start(load)
        watch.may_go_on.set()
        tier.outcome(load)
        eventually(lambda: tier.mover.num_in_flight == 0)
        assert watch.stopped == [1, 2, 4, 3]


def test_closing_ends_every_move(tmp_path) -> None:
    watch = Watch()
    with Tier(tmp_path, [pool(0)], injection=watch.injection, num_threads=1) as tier:
        op = tier.save_op([1, 2, 3], tier.grant(3), keys(3))
        tier.start(op)
        eventually(lambda: watch.stopped)
        threading.Timer(0.05, watch.may_go_on.set).start()
        tier.mover.close()
        assert tier.outcome(op) == [DONE, IO, IO]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("page-mover")]


def test_a_pool_that_does_not_fit_the_arena_is_refused(tmp_path, make) -> None:
    other = KVPool(target_only(1, 8, 1, 8, "float32"), 4, CPU)
    with Tier(tmp_path, [pool(0)], make=make) as tier:
        mover = make
        mapped = partial(MappedArena, tier.arena, tier.leases[0])
        with pytest.raises(MoverError, match=r"bundles of 512 bytes; .* has 1 parts of 256 bytes"):
            mover(other, mapped, 0, tier.board)
        with pytest.raises(MoverError, match="part 1 of"):
            mover(pool(0), mapped, 1, tier.board)


def test_moves_fail_until_there_is_an_arena(tmp_path, make) -> None:
    with Tier(tmp_path, [pool(0)], make=make) as tier:
        arenas: list[MappedArena] = []
        late = make(pool(0), lambda: arenas[0] if arenas else None, 0, tier.board)
        grants = tier.grant(2)
        early, then = (
            tier.save_op([page], [grant], keys(1)) for page, grant in zip([1, 2], grants, strict=True)
        )
        assert late.saved_checksum(grants[0].slot) is None, "nobody knows"
        late.start(early)
        assert tier.outcome(early) == [IO]
        arenas.append(MappedArena(tier.arena, tier.leases[0]))
        late.start(then)
        assert tier.outcome(then) == [DONE]
        late.close()


def test_our_own_bugs_are_caught_when_a_move_starts(tmp_path, make) -> None:
    watch = Watch()
    with Tier(tmp_path, [pool(0)], make=make, injection=watch.injection) as tier:
        watch.may_go_on.set()
        (location,) = tier.save([1], keys(1))
        watch.may_go_on.clear()
        with pytest.raises(MoveOfNoPageError, match="dummy page"):
            tier.mover.start(tier.load_op([0], [location], keys(1)))
        op = tier.load_op([5], [location], keys(1))
        tier.mover.start(op)
        with pytest.raises(AssertionError, match="page 5 is being loaded already"):
            tier.mover.start(tier.load_op([5], [location], keys(1)))
        watch.may_go_on.set()
        assert tier.outcome(op) == [DONE]
