"""Nothing waits for ever for a page's copy in the arena, and what is lost is counted once."""

import pytest

from cache_service.keys import page_keys
from cache_service.page_records import Location
from tests.unit.tier_fakes import KEYS, NAMESPACE, PAGE_SIZE, Bench, tokens
from workers.kvcache.host_tier import DISTRUST_STEPS, GRANT_STEPS
from workers.move_board import MoveStatus


def test_pages_whose_saves_fail_go_all_the_same_and_count_as_lost():
    bench = Bench(num_pages=3, policy="write_back")
    bench.run(0, tokens(12))
    bench.open(1, [50])
    for _ in range(3):
        bench.cache.reserve(1, 3 * PAGE_SIZE)
        bench.finish(MoveStatus.FAILED_IO)
    assert bench.cache.reserve(1, 3 * PAGE_SIZE)
    assert len(bench.saves()) == bench.tier.stats.num_lost_pages == 3


def test_a_page_for_which_no_grant_comes_does_not_wait_for_ever():
    bench = Bench(num_pages=3, policy="write_back", num_slots=2)
    bench.run(0, tokens(12))
    bench.open(1, [50])
    for _ in range(GRANT_STEPS):
        assert not bench.cache.reserve(1, PAGE_SIZE)
        assert bench.cache.is_coming(1, PAGE_SIZE)
        bench.finish()
    assert bench.cache.reserve(1, PAGE_SIZE), "the leaf cannot be saved: it goes"
    bench.ops()
    assert [key for *_, key in bench.saves()] == KEYS[:2]
    assert bench.tier.stats.num_lost_pages == bench.tier.stats.skipped_saves["no_grant"] == 1
    bench.cache.close(1)
    bench.run(0, tokens(12))
    bench.open(1, [50])
    assert bench.cache.reserve(1, PAGE_SIZE), "nothing has come since: it does not wait again"
    assert bench.tier.stats.num_lost_pages == 2


def test_write_back_waits_for_grants_that_come_and_loses_nothing():
    bench = Bench(num_pages=12, policy="write_back", num_slots=0)
    bench.run(0, tokens(48))
    bench.open(1, [50])
    for slot in range(12):
        assert not bench.cache.reserve(1, 12 * PAGE_SIZE)
        bench.host.grant(slot)
        for _ in range(3):
            bench.finish()
    while not bench.cache.reserve(1, 12 * PAGE_SIZE):
        bench.finish()
    assert len(bench.host.stored) == 12
    assert bench.tier.stats.num_lost_pages == bench.tier.stats.skipped_saves.total() == 0


def test_an_eviction_prefers_a_page_that_is_saved_to_one_that_waits_for_a_grant():
    bench = Bench(num_pages=2, policy="write_back", num_slots=0)
    bench.run(0, tokens(4))
    bench.run(0, tokens(4, first=20))
    other = page_keys(NAMESPACE, tokens(4, first=20), PAGE_SIZE)[0]
    bench.host.stored[other] = Location(7, 1)
    bench.open(1, [50])
    assert bench.cache.reserve(1, PAGE_SIZE)
    assert bench.cache.snapshot()[1] == [KEYS[0]]
    assert bench.tier.stats.num_lost_pages == 0


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective"])
def test_pages_without_a_grant_wait_on_the_device_and_are_saved_as_grants_come(policy):
    bench = Bench(num_pages=32, policy=policy, num_slots=2)
    bench.run(0, tokens(81))
    bench.run(0, tokens(81))
    bench.finish()
    assert len(bench.host.stored) == 2
    assert bench.cache.has_moves, "the loop looks again before long"
    for slot in range(2, 20):
        bench.host.grant(slot)
        bench.finish()
        bench.finish()
    bench.finish()
    assert list(bench.host.stored) == page_keys(NAMESPACE, tokens(80), PAGE_SIZE)
    assert not bench.tier.stats.skipped_saves and not bench.cache.has_moves
    bench.forget_device()
    assert bench.tier.stats.num_lost_pages == 0


def test_a_page_that_goes_before_a_grant_came_is_skipped_and_lost_and_its_slot_goes_to_nobody():
    bench = Bench(num_slots=0)
    bench.run(0, tokens(12))
    bench.forget_device()
    bench.host.grant(0)
    bench.finish()
    assert bench.tier.stats.skipped_saves == {"no_grant": 3} and bench.tier.stats.num_lost_pages == 3
    assert bench.saves() == [] and not bench.cache.has_moves


def test_a_page_that_is_dropped_while_it_waits_is_not_saved():
    bench = Bench()
    bench.run(0, tokens(5))
    bench.finish()
    bench.forget_device()
    bench.run(1, tokens(5, first=80))
    bench.finish()
    bench.host.free.clear()
    bench.run(1, tokens(5, first=50))  # the first in line
    other = page_keys(NAMESPACE, tokens(4, first=50), PAGE_SIZE)
    assert bench.open(0, tokens(9)) == PAGE_SIZE
    bench.finish(MoveStatus.ENQUEUED)
    assert bench.cache.reserve(0, 8)
    bench.cache.planned(10)
    bench.cache.commit(0, 8)
    bench.cache.completed(10)
    bench.moves.at[bench.loads()[0][0]] = MoveStatus.FAILED_TORN
    assert bench.finish() == [0]
    bench.host.stored[KEYS[0]] = Location(40, 9)  # another replica's
    bench.host.grant(0)
    bench.host.grant(1)
    bench.finish()
    bench.ops()
    assert [key for *_, key in bench.saves()][2:] == other
    assert bench.tier.stats.skipped_saves == {"no_grant": 1}


def test_a_page_computed_anew_waits_at_its_own_place_behind_its_parent():
    bench = Bench(num_pages=3, num_slots=0)
    bench.run(0, tokens(12))
    bench.forget_device()
    bench.run(0, tokens(12))
    for slot in range(3):
        bench.host.grant(slot)
    for _ in range(3):
        bench.finish()
    assert list(bench.host.stored) == KEYS


def test_a_replica_at_rest_does_not_look_for_ever_for_grants_that_do_not_come():
    bench = Bench(num_slots=0)
    bench.run(0, tokens(12))
    for _ in range(GRANT_STEPS):
        assert bench.cache.has_moves
        bench.finish()
    assert not bench.cache.has_moves
    bench.host.grant(0)
    bench.finish()
    assert [key for *_, key in bench.saves()] == [] and bench.ops() and len(bench.saves()) == 1


def test_a_page_that_the_arena_loses_at_once_is_not_saved_for_ever():
    bench = Bench(num_pages=1, policy="write_back")
    bench.run(0, tokens(4))
    bench.open(1, [50])
    assert not bench.cache.reserve(1, PAGE_SIZE)
    bench.finish()
    bench.host.evict(KEYS[0])
    bench.cache.settle()
    assert bench.cache.reserve(1, PAGE_SIZE)
    bench.ops()
    assert len(bench.saves()) == bench.tier.stats.num_lost_pages == 1


def test_a_page_that_does_not_go_yet_is_not_lost():
    bench = Bench(num_pages=2, num_slots=0)
    for slot in range(2):
        bench.open(slot, tokens(4, first=10 * slot))
        assert bench.cache.reserve(slot, PAGE_SIZE)
        bench.cache.planned(slot + 1)
        bench.cache.commit(slot, PAGE_SIZE)
    bench.cache.close(0)
    bench.cache.close(1)
    bench.open(2, [50])
    for _ in range(3):
        bench.cache.reserve(2, PAGE_SIZE)
    assert bench.cache.stats().num_evictions == bench.tier.stats.num_lost_pages == 1


def test_a_page_whose_copy_is_bad_is_saved_again_once_it_is_computed():
    bench = Bench()
    bench.run(0, tokens(5))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(5))
    bench.host.report_corrupt = bench.host.corrupt.append  # the arena's news of it is late
    assert bench.finish(MoveStatus.FAILED_CORRUPT) == [0]
    assert bench.run(0, tokens(5)) == 0
    bench.ops()
    assert [key for *_, key in bench.saves()] == [KEYS[0], KEYS[0]]


def test_as_many_pages_are_saved_as_have_to_go_and_none_is_lost_meanwhile():
    bench = Bench(num_pages=4, policy="write_back", num_slots=1)
    for first in (0, 10, 20, 30):
        bench.run(0, tokens(4, first))
    bench.open(1, [50])
    for _ in range(3):
        assert not bench.cache.reserve(1, PAGE_SIZE)
        assert bench.cache.is_coming(1, PAGE_SIZE)
    bench.finish()
    assert bench.cache.reserve(1, PAGE_SIZE)
    assert len(bench.saves()) == bench.cache.stats().num_evictions == 1
    assert bench.tier.stats.num_lost_pages == 0


def refuse_later(bench):
    """The server's answer to commits stays away; return how to have it say no."""
    told = []
    bench.host.commit = told.extend
    return lambda: bench.host.lost.extend(entry.key for entry in told)


def test_a_page_that_goes_before_its_commit_is_refused_is_counted_as_lost():
    bench = Bench()
    refuse = refuse_later(bench)
    bench.run(0, tokens(13))
    bench.finish()
    bench.forget_device()
    assert bench.tier.stats.num_lost_pages == 0, "as far as is known they are saved"
    refuse()
    bench.cache.settle()
    assert bench.tier.stats.num_lost_pages == 3


def test_a_page_that_went_after_its_commit_was_heard_of_is_evicted_from_the_arena_and_not_lost():
    bench = Bench()
    bench.run(0, tokens(13))
    bench.host.is_blind = True  # the news are late
    bench.finish()
    bench.forget_device()
    bench.host.is_blind = False
    bench.cache.settle()
    for key in reversed(KEYS):
        bench.host.evict(key)
    bench.cache.settle()
    assert bench.tier.stats.num_lost_pages == 0


def test_a_place_whose_load_failed_is_tried_again_after_a_while():
    bench = Bench()
    bench.run(0, tokens(5))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(5))
    assert bench.finish(MoveStatus.FAILED_IO) == [0]
    assert bench.open(0, tokens(5)) == 0
    bench.cache.close(0)
    for _ in range(DISTRUST_STEPS):
        bench.cache.settle()
    assert bench.open(0, tokens(5)) == 4
    bench.finish()
    assert bench.cache.is_readable(0)


@pytest.mark.parametrize("status", [MoveStatus.DONE, MoveStatus.FAILED_CORRUPT])
def test_a_load_that_ends_while_it_is_looked_at_is_heard_of(status):
    bench = Bench()
    bench.run(0, tokens(12))
    bench.finish()
    bench.forget_device()
    bench.open(0, tokens(13))
    bench.ops()
    bench.moves.ends_as = status
    for _ in range(2):
        for slot in bench.cache.settle():
            bench.cache.close(slot)
        bench.cache.drop_failed()
        bench.cache.check()
    assert bench.host.leases == []
    stats = bench.tier.stats
    if status is MoveStatus.DONE:
        assert bench.cache.is_readable(0) and stats.num_loaded_pages == 3
    else:
        assert stats.failed_loads == {"corrupt": 3} and bench.cache.stats().num_cached_pages == 0
