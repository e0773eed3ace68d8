"""Saves and loads as the decider sees them: policies, leases, order, failures."""

import pytest

from cache_service.keys import page_keys, salted
from tests.unit.tier_fakes import KEYS, NAMESPACE, PAGE_SIZE, Bench, tokens
from workers.move_board import MoveStatus
from workers.plan import CompletePages, LoadPages, OwnPages


def test_complete_pages_are_saved_and_committed_parents_first():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.ops()
    assert [key for *_, key in bench.saves()] == KEYS
    bench.moves.at[2] = bench.moves.at[3] = MoveStatus.DONE
    bench.cache.settle()
    assert not bench.host.stored, "a page is committed before its parent's save is over"
    bench.finish()
    assert list(bench.host.stored) == KEYS
    assert bench.host.parents == {KEYS[0]: None, KEYS[1]: KEYS[0], KEYS[2]: KEYS[1]}
    assert bench.tier.stats.num_saved_pages == 3


def test_a_page_that_is_being_saved_is_not_evicted_and_none_above_it_is():
    bench = Bench(num_pages=3)
    bench.run(0, tokens(13)[:12])
    bench.ops()
    assert len(bench.saves()) == 3
    bench.moves.at = {1: MoveStatus.DONE, 2: MoveStatus.DONE}
    bench.open(1, [50])
    assert not bench.cache.reserve(1, 4), "a page with a move under way was taken"
    assert bench.cache.is_coming(1, 4)
    bench.finish()
    assert bench.cache.reserve(1, 4)
    assert bench.cache.stats().num_cached_pages == 2


def test_evicted_pages_come_back_from_the_arena_and_wait_to_be_read():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    assert bench.open(0, tokens(13)) == 12
    ops = bench.ops()
    assert [key for *_, key in bench.loads()] == KEYS
    owned = next(op for op in ops if isinstance(op, OwnPages))
    assert owned.pages == [page for _, page, *_ in bench.loads()]
    assert ops.index(owned) < next(i for i, op in enumerate(ops) if isinstance(op, LoadPages))
    assert not bench.cache.is_readable(0)
    first = bench.loads()[0][0]
    bench.moves.at.update({first: MoveStatus.ENQUEUED, first + 1: MoveStatus.ENQUEUED})
    assert bench.cache.settle() == []
    assert not bench.cache.is_readable(0), "the third page is not there yet"
    bench.moves.at[first + 2] = MoveStatus.DONE
    assert bench.cache.settle() == []
    assert bench.cache.is_readable(0)
    told = [key for op in bench.ops() if isinstance(op, CompletePages) for key in op.keys]
    assert told == KEYS
    assert len(bench.host.leases) == 2, "slots are leased until their copies are over"
    bench.moves.at.update({first: MoveStatus.DONE, first + 1: MoveStatus.DONE})
    bench.cache.settle()
    assert bench.host.leases == []
    assert bench.tier.stats.num_loaded_pages == 3


def test_where_a_fetch_has_put_a_page_is_forgotten_once_it_is_not_there():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    where, bench.host.is_blind = dict(bench.host.stored), True
    for page_key in KEYS[:2]:
        bench.tier.arrivals.add(page_key, where[page_key], "peer")
    del bench.host.stored[KEYS[1]]
    assert bench.tier.reach(KEYS).num_stored == 2
    assert bench.open(0, tokens(13)) == 4
    bench.finish()
    assert bench.tier.reach(KEYS).num_stored == 1, "else it would never be fetched again"


def test_two_requests_with_one_prefix_wait_for_one_load():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    assert bench.open(0, tokens(13)) == bench.open(1, tokens(14)) == 12
    bench.ops()
    assert len(bench.loads()) == 3
    assert not bench.cache.is_readable(0) and not bench.cache.is_readable(1)
    assert bench.finish() == []
    assert bench.cache.is_readable(0) and bench.cache.is_readable(1)


@pytest.mark.parametrize(
    "status",
    [MoveStatus.FAILED_STALE, MoveStatus.FAILED_CORRUPT, MoveStatus.FAILED_IO, MoveStatus.FAILED_TORN],
)
def test_a_load_that_fails_sends_its_readers_back_and_is_not_tried_again(status):
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(13))
    bench.open(1, tokens(14))
    bench.open(2, tokens(9, first=70))
    bench.ops()
    second = bench.loads()[1][0]
    bench.moves.at[second] = status
    assert sorted(bench.finish()) == [0, 1]
    assert bench.tier.stats.failed_loads == {status.name.removeprefix("FAILED_").lower(): 1}
    assert bool(bench.host.corrupt) == (status is MoveStatus.FAILED_CORRUPT)
    assert bench.host.leases == []
    assert bench.open(0, tokens(13)) == 4, "the page before the bad one is good"
    bench.ops()
    assert len(bench.loads()) == 3


def test_a_load_that_turns_out_torn_after_it_was_read_sends_its_readers_back():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(13))
    assert bench.finish(MoveStatus.ENQUEUED) == []
    assert bench.cache.is_readable(0)
    bench.moves.at[bench.loads()[0][0]] = MoveStatus.FAILED_TORN
    assert bench.finish() == [0]
    assert bench.open(0, tokens(13)) == 0


def test_a_failed_loads_page_stays_leased_while_another_rank_is_at_it():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(13))
    bench.ops()
    first = bench.loads()[0][0]
    bench.moves.at = {first + n: MoveStatus.FAILED_STALE for n in range(3)}
    bench.moves.still_busy = {first}
    assert bench.finish() == [0]
    assert bench.cache.stats().num_owned_pages == 1
    assert len(bench.host.leases) == 1
    bench.moves.still_busy.clear()
    bench.finish()
    assert bench.cache.stats().num_owned_pages == 0
    assert bench.host.leases == []


def test_a_request_aborted_while_its_pages_load_leaves_them_to_the_next():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(13))
    bench.cache.close(0)
    bench.cache.check()
    assert bench.open(1, tokens(13)) == 12
    bench.ops()
    assert len(bench.loads()) == 3
    bench.finish()
    assert bench.cache.is_readable(1)


def test_loads_take_no_more_pages_than_there_are():
    bench = Bench(num_pages=4)
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    bench.open(1, [50])
    assert bench.cache.reserve(1, 8)
    assert bench.open(0, tokens(13)) == 8
    bench.finish()


def test_what_the_arena_has_can_be_loaded_once_pages_that_are_coming_are_there():
    bench = Bench(num_pages=4)
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    prompt = bench.cache.keyed(tokens(13), b"")
    assert bench.cache.can_load(prompt)
    bench.open(1, [50])
    assert bench.cache.reserve(1, 16)
    bench.cache.planned(bench.num_steps + 1)
    bench.cache.close(1)
    assert bench.cache.num_lacking(prompt, 13, num_spare_pages=0) <= 0, "they are coming"
    assert not bench.cache.can_load(prompt), "a step in flight may still touch them"
    bench.cache.completed(bench.num_steps + 1)
    assert bench.cache.can_load(prompt)
    assert bench.open(0, tokens(13)) == 12
    bench.finish()


def test_making_room_for_a_prompt_spares_the_part_of_it_that_is_there():
    bench = Bench(num_pages=4)
    bench.run(0, tokens(13))
    bench.finish()
    bench.run(1, tokens(8, first=100))
    bench.finish()
    assert bench.cache.can_load(bench.cache.keyed(tokens(13), b""))
    assert bench.open(0, tokens(13)) == 12
    bench.ops()
    assert [key for *_, key in bench.loads()] == [KEYS[2]]
    bench.finish()


def test_without_a_grant_nothing_is_saved_and_children_of_what_is_not_saved_neither():
    bench = Bench(num_slots=1)
    bench.run(0, tokens(13))
    bench.ops()
    assert [key for *_, key in bench.saves()] == KEYS[:1]
    bench.finish()
    assert not bench.tier.stats.skipped_saves, "they wait"
    bench.forget_device()
    assert bench.tier.stats.skipped_saves == {"no_grant": 2}
    assert bench.tier.stats.num_lost_pages == 2


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective"])
def test_a_page_that_the_arena_could_not_take_is_saved_once_it_is_used_again(policy):
    bench = Bench(num_slots=4, policy=policy)
    free, bench.host.free = bench.host.free, []
    bench.run(0, tokens(13))
    bench.run(0, tokens(13))
    assert bench.saves() == []
    bench.host.free = free
    bench.run(0, tokens(17))
    bench.run(0, tokens(17))
    bench.finish()
    assert list(bench.host.stored) == page_keys(NAMESPACE, tokens(16), PAGE_SIZE)


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective"])
def test_a_chat_whose_pages_the_arena_has_lost_is_saved_again_when_it_goes_on(policy):
    bench = Bench(policy=policy)
    bench.run(0, tokens(13))
    bench.run(0, tokens(13))
    bench.finish()
    bench.host.evict(KEYS[2])
    bench.finish()
    bench.run(0, tokens(17))
    bench.run(0, tokens(17))
    bench.finish()
    assert list(bench.host.stored) == page_keys(NAMESPACE, tokens(16), PAGE_SIZE)


def test_a_failed_save_gives_its_slot_back_and_takes_its_children_along():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.ops()
    bench.moves.at[1] = MoveStatus.FAILED_IO
    num_free = len(bench.host.free)
    bench.finish()
    assert bench.tier.stats.failed_saves == {"io": 1, "no_parent": 2}
    assert len(bench.host.free) == num_free + 3
    bench.forget_device()
    assert bench.tier.stats.num_lost_pages == 3


def test_a_page_that_the_arena_refused_is_not_taken_for_saved():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.host.commit = lambda entries: bench.host.lost.extend(entry.key for entry in entries)
    bench.finish()
    bench.cache.settle()
    bench.forget_device()
    assert bench.tier.stats.num_lost_pages == 3


def test_selective_write_through_saves_what_is_used_again():
    bench = Bench(policy="write_through_selective")
    bench.run(0, tokens(13))
    bench.ops()
    assert bench.saves() == []
    assert bench.run(0, tokens(13)) == 12
    bench.ops()
    assert [key for *_, key in bench.saves()] == KEYS


def test_write_back_saves_what_would_be_evicted_and_evicts_it_then():
    bench = Bench(num_pages=3, policy="write_back")
    bench.run(0, tokens(12))
    bench.ops()
    assert bench.saves() == []
    bench.open(1, [50])
    for left in (2, 1, 0):
        # One leaf after the other: each is saved before it goes. Parents come first into the arena.
        while not bench.cache.reserve(1, (3 - left) * PAGE_SIZE):
            bench.finish()
    bench.ops()
    assert list(bench.host.stored) == KEYS
    assert bench.tier.stats.num_lost_pages == 0


def test_what_another_replica_saved_is_not_saved_again():
    bench, other = Bench(), Bench()
    bench.run(0, tokens(13))
    bench.finish()
    other.open(0, tokens(13))
    assert other.cache.reserve(0, 13)
    other.host.stored = dict(bench.host.stored)  # while this one computes
    other.cache.commit(0, 13)
    other.ops()
    assert other.saves() == []


def test_what_the_arena_lost_is_saved_again_when_it_would_be_evicted():
    bench = Bench(num_pages=3, policy="write_back")
    bench.run(0, tokens(4))
    bench.open(1, [50])
    while not bench.cache.reserve(1, 3 * PAGE_SIZE):
        bench.finish()
    bench.cache.close(1)
    bench.open(0, tokens(5))
    bench.finish()
    bench.cache.close(0)
    bench.host.evict(KEYS[0])
    bench.cache.settle()
    bench.open(1, [50])
    while not bench.cache.reserve(1, 3 * PAGE_SIZE):
        bench.finish()
    assert [key for *_, key in bench.saves()] == [KEYS[0], KEYS[0]]


def test_moves_in_flight_are_bounded_by_the_board():
    bench = Bench(capacity=2)
    bench.run(0, tokens(13))
    bench.ops()
    assert len(bench.saves()) == 2
    bench.host.free.clear()
    bench.finish()
    bench.forget_device()
    assert bench.open(0, tokens(13)) == 8
    bench.ops()
    assert len(bench.loads()) == 2


def test_tenants_share_nothing_and_are_charged_apart():
    bench = Bench()
    entries = []
    bench.host.commit = entries.extend
    for slot, salt in enumerate((b"", b"a", b"b")):
        bench.run(slot, tokens(5), salt)
        bench.finish()
    assert len({entry.tenant for entry in entries}) == 3
    assert entries[1].key == page_keys(salted(NAMESPACE, b"a"), tokens(4), PAGE_SIZE)[0]


def test_uses_are_told_to_the_arena():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.finish()
    bench.run(0, tokens(9))
    assert bench.host.touched == [KEYS[:2]]
