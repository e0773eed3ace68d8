import pytest

from workers.kvcache.page_pool import PagePool, PageState


def test_the_dummy_page_is_never_handed_out():
    pool = PagePool(3)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.num_free == 0
    with pytest.raises(AssertionError, match="1 pages asked for, 0 are free"):
        pool.allocate(1)


def test_a_page_gets_a_new_generation_each_time_it_is_handed_out():
    pool = PagePool(1)
    generations = []
    for _ in range(3):
        (page,) = pool.allocate(1)
        generations.append(pool.generation(page))
        pool.release(page)
    assert generations == [1, 2, 3]


def test_a_page_is_owned_until_its_last_lease_is_released():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.lease(page)
    pool.release(page)
    assert pool.state(page) is PageState.OWNED and pool.num_leases(page) == 1
    pool.release(page)
    assert pool.state(page) is PageState.FREE
    with pytest.raises(AssertionError, match="is FREE, not OWNED"):
        pool.release(page)
    with pytest.raises(AssertionError, match="is FREE, not OWNED"):
        pool.lease(page)


def test_a_released_page_quiesces_until_the_last_step_that_touches_it_is_complete():
    pool = PagePool(2)
    early, late = pool.allocate(2)
    pool.release(early, last_step=1)
    pool.release(late, last_step=3)
    assert (pool.num_free, pool.num_quiescing, pool.num_owned) == (0, 2, 0)
    pool.completed(2)
    assert pool.state(early) is PageState.FREE and pool.state(late) is PageState.QUIESCING
    assert pool.take_freed() == [early]
    pool.completed(3)
    assert pool.take_freed() == [late] and pool.num_free == 2
    pool.check()


def test_the_fence_is_that_of_the_latest_holder_whoever_releases_last():
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.lease(page)
    pool.release(page, last_step=5)
    pool.completed(4)
    assert not pool.is_idle(page)
    pool.release(page)  # a holder that never touches the page: the tree
    assert pool.state(page) is PageState.QUIESCING
    pool.completed(5)
    assert pool.state(page) is PageState.FREE


def test_a_page_whose_steps_are_complete_is_free_at_once():
    pool = PagePool(1)
    pool.completed(7)
    (page,) = pool.allocate(1)
    pool.release(page, last_step=7)
    assert pool.take_freed() == [page]
    assert pool.take_freed() == []


def test_completions_that_arrive_late_or_twice_change_nothing():
    pool = PagePool(1)
    pool.completed(4)
    pool.completed(2)
    (page,) = pool.allocate(1)
    pool.release(page, last_step=4)
    assert pool.state(page) is PageState.FREE
    pool.check()


def test_check_finds_a_page_that_is_lost():
    pool = PagePool(3)
    pool.check()
    pool._free.pop()
    with pytest.raises(AssertionError, match=r"free 2 \+ owned 0 \+ quiescing 0 != total 3"):
        pool.check()
