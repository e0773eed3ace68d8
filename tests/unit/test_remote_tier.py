"""A store attached to a node's arena, detached and failing, with puts and gets under way."""

import itertools
import select
from collections import Counter

import pytest

from cache_service import remote_tier
from cache_service.arena_user import ArenaAccess
from cache_service.attached_store import MAX_FAILURES, MAX_LISTED_PER_TURN, RETRY_S
from cache_service.inbox import Inbox
from cache_service.keys import PageKey
from cache_service.lease_row import LeaseRow
from cache_service.put_queue import PutLimits
from cache_service.relocation_follower import RelocationIndex
from cache_service.remote import GetStatus, PageBuffer, PutStatus
from cache_service.remote_tier import MAX_KNOWN_RATIO, RemoteTier
from tests.unit.arenas import key, new_store, store_chain
from tests.unit.cache_nodes import eventually
from tests.unit.fake_store import ADDRESS, FakeOpener

GROUP, ROW, TIMEOUT_S = 9, 3, 20.0
OTHER_ADDRESS = "disk:/another-store?gb=1"


class Node:
    """A tier over a small arena, driven by the test's thread and clock."""

    def __init__(self, folder, address=ADDRESS, begins=True, limits=None):
        self.owned, self.store, self.changes = new_store(folder, num_slots=32)
        self.arena = self.owned.arena
        self.opener = FakeOpener()
        self.inbox = Inbox()
        self.counts = Counter()
        self.now_s = 0.0
        self.names = itertools.count()
        self.leases = LeaseRow(self.arena, ROW)
        self.tier = RemoteTier(
            address,
            "10.0.0.1",
            self.inbox,
            self.changes,
            self.counts,
            open_store=self.opener,
            limits=limits,
            clock=lambda: self.now_s,
        )
        if begins:
            self.begin()

    def begin(self):
        self.tier.begin(ArenaAccess(self.arena, self.store, GROUP, self.leases))

    def turn(self):
        self.inbox.run()
        has_more = self.tier.tick(self.now_s)
        self.store.check()
        return has_more

    def until(self, holds):
        return eventually(lambda: (self.turn(), holds())[1])

    def attached(self):
        self.until(lambda: self.tier.address)
        return self.opener.store

    def commit(self, num_pages=1):
        keys = store_chain(self.store, self.arena, [next(self.names) for _ in range(num_pages)])
        self.tier.offer(keys)
        return keys

    def ask(self, begin, *arguments):
        """Begin an attach or a detach; return the list that its answer goes into."""
        told = []
        begin(*arguments, told.append)
        return told

    def answer(self, told):
        self.until(lambda: told)
        (answer,) = told
        return answer

    def get(self, keys, timeout_s=TIMEOUT_S):
        buffers = [PageBuffer(page_key, memoryview(bytearray(256))) for page_key in keys]
        batch = self.tier.source.get(buffers, timeout_s)
        self.turn()
        return [result.status for result in batch.results]

    def heard(self):
        """Return what a listener knows that has heard every change."""
        index = RelocationIndex()
        index.apply(self.changes)
        return index

    def close(self):
        self.opener.goes_on.set()
        assert self.tier.end()
        assert self.tier.close(TIMEOUT_S)
        self.turn()
        assert self.leases.num_leased == 0
        assert all(store.is_closed for store in self.opener.stores)
        self.inbox.close()
        self.owned.close()


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


def test_pages_are_put_in_the_background_and_told(node):
    store = node.attached()
    assert node.tier.address == ADDRESS
    keys = node.commit(5)
    node.until(lambda: node.tier.num_known == 5)
    assert store.put_keys == keys
    assert all(node.heard().is_remote(page_key) for page_key in keys)
    assert [entry.key for entry in node.tier.stored()] == keys
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


def test_what_a_store_has_from_the_start_is_told_the_last_used_of_it_and_a_part_each_turn(tmp_path):
    node = Node(tmp_path, begins=False)
    num_known = MAX_KNOWN_RATIO * 32
    keys = [PageKey(number.to_bytes(16, "big")) for number in range(num_known + 50)]
    node.opener.records.update(dict.fromkeys(keys))
    node.begin()
    node.attached()
    node.until(lambda: not node.turn())
    assert [entry.key for entry in node.tier.stored()] == keys[-num_known:]
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
