"""Stores attached and detached at run time, with puts and gets under way: nothing is lost, nothing hangs."""

import select

import pytest

from cache_service import remote_tier
from cache_service.put_queue import PutLimits
from cache_service.remote import GetStatus, PageBuffer
from tests.unit.fake_store import ADDRESS
from tests.unit.remote_tier_node import TIMEOUT_S, Node

OTHER_ADDRESS = "disk:/another-store?gb=1"


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def bare(tmp_path):
    """Without a store in its configuration."""
    node = Node(tmp_path, None)
    yield node
    node.close()


def test_a_store_is_attached_and_replaced_at_run_time(bare):
    keys = bare.commit(2)
    assert bare.answer(bare.ask(bare.tier.attach, ADDRESS)) is None
    first = bare.opener.store
    keys += bare.commit(2)
    bare.until(lambda: bare.tier.num_known == 4)
    bare.opener.records = {}
    assert bare.answer(bare.ask(bare.tier.attach, OTHER_ADDRESS)) is None
    assert bare.tier.address == OTHER_ADDRESS
    assert first.is_closed
    assert not any(bare.heard().is_remote(page_key) for page_key in keys)
    bare.until(lambda: bare.tier.num_known == 4)  # the other one gets what is here
    assert bare.opener.store.put_keys[:2] in (keys[:2], keys[2:])


def test_pages_that_were_there_before_their_store_go_when_there_is_room(tmp_path):
    node = Node(tmp_path, None, limits=PutLimits(max_pages=8, max_batch_pages=4))
    for _ in range(4):
        node.commit(6)
    assert node.answer(node.ask(node.tier.attach, ADDRESS)) is None
    node.until(lambda: node.tier.num_known == 24)
    assert node.counts["puts", "queue_full"] == 0
    node.close()


@pytest.mark.parametrize("text", ["nowhere", "disk:/cache"])
def test_a_bad_address_is_refused_and_changes_nothing(node, text):
    node.attached()
    assert f"store {text!r}" in node.answer(node.ask(node.tier.attach, text))
    assert node.tier.address == ADDRESS


def test_a_store_that_cannot_be_opened_at_run_time_is_refused_and_not_tried_again(bare):
    bare.opener.error = "nobody listens at 10.0.0.9:50051"
    assert bare.answer(bare.ask(bare.tier.attach, ADDRESS)) == bare.opener.error
    bare.now_s += 10 * remote_tier.RETRY_S
    bare.turn()
    assert len(bare.opener.asked) == 1 and bare.tier.address == ""
    assert bare.counts["stores", "failed"] == 1


def test_a_store_that_cannot_be_opened_leaves_the_former_in_use(node):
    node.attached()
    keys = node.commit(2)
    node.until(lambda: node.tier.num_known == 2)
    node.opener.error = "nobody listens at 10.0.0.9:50051"
    why = node.answer(node.ask(node.tier.attach, OTHER_ADDRESS))
    assert why == f"{node.opener.error}; the node goes back to its store {ADDRESS}"
    node.until(lambda: node.counts["stores", "failed"] == 2)  # nor could that be opened again
    node.opener.error = None
    node.now_s += remote_tier.RETRY_S
    node.attached()
    assert node.tier.address == ADDRESS
    node.until(lambda: node.tier.num_known == 2)
    assert node.get(keys) == [GetStatus.FOUND] * 2


def test_a_store_given_up_for_another_leaves_the_former_in_use(node):
    node.attached()
    node.opener.goes_on.clear()
    told = node.ask(node.tier.attach, OTHER_ADDRESS)
    node.until(lambda: len(node.opener.asked) == 2)
    assert node.tier.end()  # of the arena
    assert "was given up" in node.answer(told)
    node.opener.goes_on.set()
    node.begin()
    node.attached()
    assert node.tier.address == ADDRESS


def test_without_an_arena_a_store_is_refused(tmp_path):
    node = Node(tmp_path, None, begins=False)
    assert "no worker has attached" in node.answer(node.ask(node.tier.attach, ADDRESS))
    assert node.answer(node.ask(node.tier.detach)) is None
    node.close()


def test_an_attach_that_hangs_is_answered_in_time_and_what_comes_late_is_closed(bare):
    bare.opener.goes_on.clear()
    told = bare.ask(bare.tier.attach, ADDRESS)
    bare.turn()
    assert not told
    bare.now_s += remote_tier.OPEN_TIMEOUT_S
    assert "was not open within 25 s" in bare.answer(told)
    bare.opener.goes_on.set()
    bare.until(lambda: bare.opener.stores and bare.opener.store.is_closed)
    assert bare.tier.address == "" and bare.tier.source is None


def test_the_last_attach_holds(bare):
    bare.opener.goes_on.clear()
    first = bare.ask(bare.tier.attach, ADDRESS)
    second = bare.ask(bare.tier.attach, OTHER_ADDRESS)
    assert "before this was done" in bare.answer(first)
    bare.opener.goes_on.set()
    assert bare.answer(second) is None
    assert bare.tier.address == OTHER_ADDRESS
    bare.until(lambda: bare.opener.stores[0].is_closed)
    assert not bare.opener.stores[1].is_closed


def test_a_detach_gives_up_an_attach_that_is_not_done(bare):
    bare.opener.goes_on.clear()
    attach = bare.ask(bare.tier.attach, ADDRESS)
    detach = bare.ask(bare.tier.detach)
    assert "the store was detached before this was done" in bare.answer(attach)
    assert bare.answer(detach) is None
    bare.opener.goes_on.set()
    bare.until(lambda: bare.opener.stores and bare.opener.store.is_closed)
    assert bare.tier.address == ""


def test_an_opening_that_nobody_waits_for_any_more_is_not_begun(bare):
    bare.opener.goes_on.clear()
    for address in (ADDRESS, OTHER_ADDRESS):
        bare.ask(bare.tier.attach, address)
    bare.until(lambda: bare.opener.asked)
    bare.ask(bare.tier.detach)
    bare.opener.goes_on.set()
    bare.until(lambda: bare.opener.stores and bare.opener.store.is_closed)
    assert bare.answer(bare.ask(bare.tier.attach, ADDRESS)) is None
    assert len(bare.opener.asked) == 2


def test_a_detach_ends_what_is_under_way_and_loses_no_slot(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=2))
    store = node.attached()
    first = node.commit(2)
    node.until(lambda: node.tier.num_known == 2 and node.leases.num_leased == 0)
    store.goes_on.clear()
    node.commit(6)
    assert store.hanging.acquire(timeout=TIMEOUT_S)
    assert node.leases.num_leased == 2
    source = node.tier.source
    assert node.answer(node.ask(node.tier.detach)) is None
    assert store.is_closed and node.tier.source is None
    node.until(lambda: node.leases.num_leased == 0)
    assert node.counts["puts", "detached"] == 6
    assert not any(node.heard().is_remote(page_key) for page_key in first)
    # Whoever got the source before asks a closed store; what it says is of no store in use.
    batch = source.get([PageBuffer(first[0], memoryview(bytearray(256)))], TIMEOUT_S)
    assert [result.status for result in batch.results] == [GetStatus.FAILED]
    node.turn()
    assert node.tier.num_known == 0
    node.close()


def test_what_a_get_found_in_a_store_detached_meanwhile_is_not_told(node):
    node.attached()
    keys = node.commit(1)
    node.until(lambda: node.tier.num_known == 1)
    batch = node.tier.source.get([PageBuffer(keys[0], memoryview(bytearray(256)))], TIMEOUT_S)
    assert [result.status for result in batch.results] == [GetStatus.FOUND]
    node.tier.detach(lambda why: None)
    node.turn()
    assert node.tier.num_known == 0 and not node.heard().is_remote(keys[0])


def test_a_store_that_was_opened_the_moment_before_a_detach_is_closed(bare):
    bare.tier.attach(ADDRESS, lambda why: None)
    assert select.select([bare.inbox.descriptor], [], [], TIMEOUT_S)[0]
    assert bare.answer(bare.ask(bare.tier.detach)) is None
    bare.until(lambda: bare.opener.store.is_closed)
    assert bare.tier.address == ""


def test_a_detach_does_not_wait_for_ever_and_the_slots_stay_leased_until_the_end(tmp_path):
    node = Node(tmp_path)
    store = node.attached()
    store.close = lambda timeout_s: False  # whatever was called hangs on
    store.goes_on.clear()
    node.commit(2)
    assert store.hanging.acquire(timeout=TIMEOUT_S)
    assert node.answer(node.ask(node.tier.detach)) is None
    for _ in range(3):
        node.turn()
    assert node.leases.num_leased == 2
    store.goes_on.set()
    node.until(lambda: node.leases.num_leased == 0)
    del store.close
    store.close(TIMEOUT_S)
    node.close()


def test_a_detach_behind_an_opening_that_hangs_is_answered_in_time(bare):
    bare.opener.goes_on.clear()
    bare.ask(bare.tier.attach, ADDRESS)
    bare.opener.goes_on.set()
    bare.attached()
    bare.opener.goes_on.clear()
    bare.ask(bare.tier.attach, OTHER_ADDRESS)  # closes the first, then hangs
    bare.until(lambda: len(bare.opener.asked) == 2)
    told = bare.ask(bare.tier.detach)
    assert bare.answer(told) is None


def test_another_arena_has_the_store_opened_again(tmp_path):
    node = Node(tmp_path)
    first = node.attached()
    node.commit(2)
    node.until(lambda: node.tier.num_known == 2)
    assert node.tier.end()
    assert first.is_closed and node.tier.address == ""
    node.begin()
    node.until(lambda: len(node.opener.stores) == 2 and node.tier.address)
    assert node.tier.address == ADDRESS
    node.until(lambda: node.tier.num_known == 2)  # the store lists them
    node.close()


def test_the_end_of_an_arena_says_whether_a_put_still_reads_it(tmp_path):
    node = Node(tmp_path)
    store = node.attached()
    close, store.close = store.close, lambda timeout_s: False
    store.goes_on.clear()
    node.commit(2)
    assert store.hanging.acquire(timeout=TIMEOUT_S)
    assert not node.tier.end()
    assert close(TIMEOUT_S)
    node.until(lambda: node.leases.num_leased == 0)
    assert node.tier.end()
    node.close()
