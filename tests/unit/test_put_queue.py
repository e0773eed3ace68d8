"""Which pages are put into a remote store, in which order, and what holds them while they are."""

import itertools
from collections import Counter

import pytest

from cache_service.arena_safety import ArenaSafety
from cache_service.arena_user import ArenaAccess
from cache_service.lease_row import LeaseRow
from cache_service.put_queue import PutLimits, PutQueue
from cache_service.remote import PutStatus
from cache_service.remote_keys import RemoteKeys
from tests.unit.arenas import key, new_store, store_chain

GROUP = 9


class Node:
    """An arena and the queue over it."""

    def __init__(self, folder, limits=None, safety=None, num_slots=16):
        self.owned, self.store, self.changes = new_store(folder, safety, num_slots=num_slots, num_ranks=2)
        self.arena = self.owned.arena
        self.keys = RemoteKeys(100, self.changes)
        self.counts = Counter()
        self.names = itertools.count(1_000)
        access = ArenaAccess(self.arena, self.store, GROUP, LeaseRow(self.arena, 3))
        self.queue = PutQueue(access, self.keys, self.counts, limits or PutLimits())

    def chain(self, names, parent=None):
        return store_chain(self.store, self.arena, names, parent)

    def take(self):
        self.batch = self.queue.take()
        return [page.record.key for page in self.batch]

    def end(self, *statuses):
        self.queue.ended(self.batch, statuses or [PutStatus.STORED] * len(self.batch))
        self.queue.release(self.batch)

    @property
    def losses(self):
        return {reason: count for (_, reason), count in self.counts.items() if reason != "stored"}

    def fill(self):
        """Write new pages until no more get in, each at the cost of some other."""
        for _ in range(2 * self.arena.spec.num_slots):
            if self.store.grant(1, 1):
                self.store.reclaim(1)
                self.chain([next(self.names)])


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.owned.close()


def test_pages_go_with_what_they_continue_parents_first(node):
    keys = node.chain("abcd")
    node.queue.offer([keys[2]])
    assert node.take() == keys[:3]
    node.end()
    node.queue.offer([keys[3], keys[0]])
    assert node.take() == keys[3:]
    node.end()
    assert all(page_key in node.keys for page_key in keys)
    assert node.losses == {}


def test_a_record_says_what_the_slots_header_says(node):
    (page_key,) = node.chain("a")
    node.queue.offer([page_key])
    node.take()
    (page,) = node.batch
    record, slot = page.record, page.location.slot
    assert (record.key, record.length) == (page_key, 16)
    assert record.checksums == (node.arena.checksum(slot, 0), node.arena.checksum(slot, 1))
    assert record.data == node.arena.slot_data(slot)
    assert page.is_intact()
    node.end()


def test_what_waits_is_being_put_or_is_there_is_not_put_again(node):
    keys = node.chain("ab")
    node.queue.offer(keys)
    node.queue.offer(keys)
    assert len(node.queue) == 2
    assert node.take() == keys
    node.queue.offer(keys)
    assert len(node.queue) == 0
    node.end(PutStatus.STORED, PutStatus.PRESENT)
    node.queue.offer(keys)
    assert len(node.queue) == 0
    node.keys.lose(keys[1])
    node.queue.offer(keys)
    assert node.take() == [keys[1]]
    node.end()


@pytest.mark.parametrize("limits", [PutLimits(max_pages=3), PutLimits(max_bytes=3 * 512)])
def test_a_full_queue_is_a_counted_loss_and_parents_have_the_room(tmp_path, limits):
    node = Node(tmp_path, limits)
    keys = node.chain("abcde")
    node.queue.offer([keys[4]])
    assert node.losses == {"queue_full": 1}
    node.queue.offer(node.chain("xy"))
    assert node.losses == {"queue_full": 3}
    assert node.take() == keys[:3]
    node.end()
    node.queue.offer([keys[4]])  # what was lost goes with the next that needs it
    assert node.take() == keys[3:]
    node.end()
    node.owned.close()


def test_a_page_that_left_the_arena_before_it_was_offered_is_no_loss(node):
    """As the pages are that were there before their store was: they are offered when there is room."""
    node.queue.offer([key("gone"), *node.chain("a"), key("gone too")])
    assert len(node.queue) == 1
    assert node.losses == {}


@pytest.mark.parametrize("limits", [PutLimits(max_batch_pages=2), PutLimits(max_batch_bytes=2 * 512)])
def test_a_batch_is_bounded(tmp_path, limits):
    node = Node(tmp_path, limits)
    keys = node.chain("abcde")
    node.queue.offer(keys)
    for part in (keys[:2], keys[2:4], keys[4:]):
        assert node.take() == part
        node.end()
    node.owned.close()


def test_a_batch_of_a_store_has_at_most_256_descriptors():
    assert PutLimits().max_batch_pages * 2 <= 256


def test_a_page_that_has_left_the_arena_is_a_counted_loss(node):
    keys = node.chain("ab")
    node.queue.offer(keys)
    node.store.drop(node.store.lookup(keys)[0], "test")
    assert not node.queue.has_page()
    assert node.losses == {"gone": 2}
    assert node.take() == []


@pytest.mark.parametrize("leases", [True, False])
def test_a_slot_that_is_being_put_is_nobody_elses_until_the_batch_is_quiet(tmp_path, leases):
    """Without leases the slot gets another page's bytes under the first one's checksums."""
    node = Node(tmp_path, safety=ArenaSafety(leases=leases))
    (page_key,) = node.chain("a")
    node.queue.offer([page_key])
    node.take()
    node.queue.ended(node.batch, [PutStatus.TIMED_OUT])  # the deadline is over, the bytes are read still
    node.fill()
    (page,) = node.batch
    assert page.is_intact() is leases
    node.store.drop(page.location, "test")
    assert node.store.num_draining == leases
    node.queue.release(node.batch)
    node.fill()
    assert node.store.num_draining == 0
    assert page_key not in node.keys
    node.store.check()
    node.owned.close()


@pytest.mark.parametrize("loss", [PutStatus.FULL, PutStatus.FAILED, PutStatus.TIMED_OUT])
def test_what_continues_a_lost_page_is_not_told_and_goes_again_with_it(node, loss):
    keys = node.chain("abc")
    node.queue.offer(keys)
    node.take()
    node.end(PutStatus.STORED, loss, PutStatus.STORED)
    assert [page_key in node.keys for page_key in keys] == [True, False, False]
    assert node.losses == {loss.value: 1}
    node.queue.offer([keys[2]])
    assert node.take() == keys[1:]
    node.end(PutStatus.STORED, PutStatus.PRESENT)
    assert all(page_key in node.keys for page_key in keys)


def test_a_corrupt_page_is_not_put_and_leaves_the_arena(node):
    keys = node.chain("ab")
    node.queue.offer(keys)
    node.take()
    node.batch[0].record.data[300] ^= 1  # of the second rank
    assert [page.is_intact() for page in node.batch] == [False, True]
    node.end(None, PutStatus.STORED)
    assert node.store.lookup(keys) == [None, None]
    assert node.losses == {"corrupt": 1}
    assert len(node.keys) == 0
    node.store.check()


def test_pages_that_wait_when_the_store_goes_are_counted(node):
    keys = node.chain("abc")
    node.queue.offer(keys)
    node.queue.clear("detached")
    assert node.losses == {"detached": 3}
    assert not node.queue.has_page()
    assert key("a") not in node.keys
