"""What is put into a store in the background, got from it and learnt of it, also while it fails."""

import pytest

from cache_service import remote_tier
from cache_service.attached_store import MAX_FAILURES, MAX_LISTED_PER_TURN, RETRY_S
from cache_service.keys import PageKey
from cache_service.put_queue import PutLimits
from cache_service.remote import GetStatus, PutStatus
from cache_service.remote_tier import MAX_KNOWN_RATIO
from tests.unit.arenas import key
from tests.unit.fake_store import ADDRESS
from tests.unit.remote_tier_node import TIMEOUT_S, Node


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.close()


def test_pages_are_put_in_the_background_and_told(node):
    store = node.attached()
    assert node.tier.address == ADDRESS
    keys = node.commit(5)
    node.until(lambda: node.tier.num_known == 5)
    assert store.put_keys == keys
    assert all(node.heard().is_remote(page_key) for page_key in keys)
    assert list(node.tier.known_keys()) == keys
    assert node.counts["puts", "stored"] == 5
    node.until(lambda: node.leases.num_leased == 0)


def test_the_store_is_opened_for_this_nodes_layout_and_memory(node):
    node.attached()
    ((address, layout, num_bytes, where),) = node.opener.asked
    assert (address.folder, where) == ("/store-of-a-test", "10.0.0.1")
    assert (layout.fingerprint, layout.slot_bytes) == (node.arena.spec.fingerprint, 256)
    assert num_bytes == 32 * 256


def test_batches_are_split(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=8))
    store = node.attached()
    node.commit(20)
    node.until(lambda: node.tier.num_known == 20)
    assert store.batch_sizes == [8, 8, 4]
    node.close()


def test_a_store_that_cannot_be_opened_at_the_start_is_tried_again(tmp_path):
    node = Node(tmp_path, begins=False)
    node.opener.error = "nobody listens"
    node.begin()
    node.until(lambda: node.counts["stores", "failed"] == 1)
    node.commit()  # goes on without
    assert node.tier.source is None and node.tier.address == ""
    node.opener.error = None
    node.now_s += remote_tier.RETRY_S - 1
    node.turn()
    assert len(node.opener.asked) == 1
    node.now_s += 1
    node.attached()
    assert node.counts["stores", "attached"] == 1
    node.close()


def test_a_store_that_stays_away_says_why_and_is_logged_ever_more_rarely(tmp_path, caplog):
    node = Node(tmp_path, begins=False)
    node.opener.error = "nobody listens"
    node.begin()
    for num_tries in range(1, 61):  # ten minutes
        node.until(lambda num_tries=num_tries: node.counts["stores", "failed"] == num_tries)
        assert node.tier.why_not == "nobody listens"
        node.now_s += remote_tier.RETRY_S
    assert 4 <= len(caplog.records) <= 7
    node.opener.error = "no room"
    node.until(lambda: node.counts["stores", "failed"] == 61)
    assert caplog.records[-1].why == node.tier.why_not == "no room"
    node.opener.error = None
    node.now_s += remote_tier.RETRY_S
    node.attached()
    assert node.tier.why_not == ""
    node.close()


def test_what_a_store_has_from_the_start_is_told_the_last_used_of_it_and_a_part_each_turn(tmp_path):
    node = Node(tmp_path, begins=False)
    num_known = MAX_KNOWN_RATIO * 32
    keys = [PageKey(number.to_bytes(16, "big")) for number in range(num_known + 50)]
    node.opener.records.update(dict.fromkeys(keys))
    node.begin()
    node.attached()
    node.until(lambda: not node.turn())
    assert list(node.tier.known_keys()) == keys[-num_known:]
    assert num_known < MAX_LISTED_PER_TURN
    node.close()


def test_gets_teach_what_the_store_has(node):
    node.attached()
    keys = node.commit(2)
    node.until(lambda: node.tier.num_known == 2)
    del node.opener.records[keys[0]]
    header, data = node.opener.records[keys[1]]
    assert node.get([*keys, key("never")]) == [GetStatus.MISSING, GetStatus.FOUND, GetStatus.MISSING]
    assert not node.heard().is_remote(keys[0]) and node.heard().is_remote(keys[1])
    node.opener.records[keys[1]] = (header, data[:-1] + b"?")
    assert node.get(keys[1:]) == [GetStatus.CORRUPT]
    assert node.tier.num_known == 0 and not node.heard().is_remote(keys[1])
    node.opener.records[keys[1]] = (header, data)
    assert node.get(keys[1:]) == [GetStatus.FOUND]
    assert node.heard().is_remote(keys[1])
    assert node.counts["gets", "missing"] == 2 and node.counts["gets", "corrupt"] == 1


def test_a_slow_store_stalls_nobody_and_what_does_not_fit_is_counted(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_pages=4, max_batch_pages=1))
    store = node.attached()
    store.goes_on.clear()
    node.commit(10)  # returns
    assert store.hanging.acquire(timeout=TIMEOUT_S)
    assert node.tier.num_waiting == 4 - 1
    assert node.counts["puts", "queue_full"] == 6
    store.goes_on.set()
    node.until(lambda: node.tier.num_known == 4)
    node.close()


def test_slots_stay_leased_until_their_batch_is_quiet_and_the_next_batch_waits(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=2))
    store = node.attached()
    store.lingers = True
    node.commit(4)
    node.until(lambda: node.tier.num_known == 2)
    assert not node.tier.source.wait_until_quiet(0.3)
    node.turn()
    assert (node.leases.num_leased, store.batch_sizes) == (2, [2])
    store.lingers = False
    store.lingering[0].let_go()
    node.until(lambda: node.tier.num_known == 4)
    node.until(lambda: node.leases.num_leased == 0)
    node.close()


def test_bytes_that_are_not_what_was_saved_are_not_put(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=1))
    store = node.attached()
    store.goes_on.clear()
    good, bad = node.commit(2)
    assert store.hanging.acquire(timeout=TIMEOUT_S)
    (location,) = node.store.lookup([bad])
    node.arena.slot_data(location.slot)[100] ^= 1
    store.goes_on.set()
    node.until(lambda: node.counts["puts", "corrupt"] == 1)
    assert store.put_keys == [good]
    assert node.store.lookup([bad]) == [None]
    node.close()


def test_a_store_that_refuses_puts_is_left_alone_for_a_while(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=1))
    store = node.attached()
    store.status = PutStatus.FULL
    node.commit(8)
    node.until(lambda: node.counts["puts", "full"] == MAX_FAILURES)
    node.until(lambda: node.leases.num_leased == 0)
    assert len(store.batch_sizes) == MAX_FAILURES
    assert node.counts["store_failures", "put: as the test wants"] == MAX_FAILURES
    store.status = None
    node.now_s += RETRY_S
    # The first ones, which are lost, go again with a page that continues them.
    last = node.commit(1)
    node.until(lambda: node.tier.num_waiting == 0 and store.put_keys[-1:] == last)
    assert node.counts["puts", "full"] == MAX_FAILURES
    node.close()


def test_the_log_says_once_that_a_store_takes_no_pages_and_once_that_it_does_again(tmp_path, caplog):
    caplog.set_level("INFO", "cache_service.attached_store")
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=1))
    store = node.attached()
    store.status = PutStatus.FULL
    node.commit(8)
    node.until(lambda: node.counts["puts", "full"] == MAX_FAILURES)
    node.until(lambda: node.leases.num_leased == 0)
    node.now_s += RETRY_S
    node.commit(1)
    node.until(lambda: node.counts["puts", "full"] == MAX_FAILURES + 1)
    node.until(lambda: node.leases.num_leased == 0)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and warning.why == "as the test wants, it is full"
    store.status = None
    node.now_s += 2 * RETRY_S
    node.commit(2)
    node.until(lambda: node.tier.num_waiting == 0 and node.tier.num_known)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    node.close()


def test_what_a_store_had_is_forgotten_after_it_was_away_and_put_again(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=1))
    store = node.attached()
    keys = node.commit(4)
    node.until(lambda: node.tier.num_known == 4)
    gone = keys[-1]
    node.store.drop(node.store.lookup([gone])[0], "test")
    store.status = PutStatus.FAILED
    node.commit(MAX_FAILURES)
    node.until(lambda: node.counts["puts", "failed"] == MAX_FAILURES)
    node.until(lambda: node.leases.num_leased == 0)
    assert node.tier.num_known == 4
    store.records.clear()  # a master that was started again
    store.status = None
    node.now_s += RETRY_S
    node.commit(1)
    node.until(lambda: node.tier.num_known == 3 + MAX_FAILURES + 1)
    assert not node.heard().is_remote(gone) and all(node.heard().is_remote(key) for key in keys[:-1])
    node.close()


def test_a_breaker_whose_probe_finds_nothing_to_put_stays_ready(tmp_path):
    node = Node(tmp_path, limits=PutLimits(max_batch_pages=1))
    store = node.attached()
    store.status = PutStatus.FAILED
    keys = node.commit(MAX_FAILURES + 1)
    node.until(lambda: node.counts["puts", "failed"] == MAX_FAILURES)
    node.until(lambda: node.leases.num_leased == 0)
    node.store.drop(node.store.lookup(keys[-1:])[0], "test")
    store.status = None
    node.now_s += RETRY_S
    node.turn()
    assert node.counts["puts", "gone"] == 1
    node.commit(1)
    node.until(lambda: node.tier.num_known == 1)
    node.close()


def test_a_store_that_does_not_answer_gets_is_not_asked_for_a_while(node):
    store = node.attached()
    keys = node.commit(1)
    node.until(lambda: node.tier.num_known == 1)
    store.is_deaf = True
    for _ in range(MAX_FAILURES):
        assert node.get(keys) == [GetStatus.FAILED]
    store.is_deaf = False
    assert node.get(keys) == [GetStatus.FAILED]
    assert node.counts["gets", "skipped"] == 1
    assert node.tier.num_known == 1  # nobody said that it is not there
    node.now_s += RETRY_S
    assert node.get(keys) == [GetStatus.FOUND]
    assert node.get([]) == []
