"""Pages from a peer in several parts: one is read while the last is verified; what goes wrong with one takes
nothing from the others.
"""

import itertools

import pytest

from cache_service.config import CacheConfig
from cache_service.messages import FetchStatus
from cache_service.peer_fetch import MAX_PART_PAGES
from cache_service.remote_worker import Batch
from cache_service.transfer import ReadStatus
from tests.unit.cache_nodes import BUNDLE_BYTES, eventually
from tests.unit.peer_nodes import two_nodes

FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus
NUM_PAGES = 600
"""Three parts."""


def config(num_slots):
    return CacheConfig(host_cache_gb=(num_slots * (BUNDLE_BYTES + 192) + 20_480) / 2**30)


@pytest.fixture
def nodes(tmp_path):
    options = {"config": config(3_000)}
    with two_nodes(tmp_path, options, options) as (owner, reader):
        owner.commit(range(NUM_PAGES))
        yield owner, reader
        eventually(lambda: reader.stats().num_writing == reader.stats().num_lingering == 0)
        for node in (owner, reader):
            if not node.is_stopped:
                eventually(lambda node=node: node.core._peers.leases.num_slots == 0)
                node.check()


def fails_at(transfer, number, place):
    """Have one run of the transfer's `number`-th read fail, at once."""
    read, numbers = transfer.read, itertools.count(1)

    def read_or_fail(segment, runs, timeout_s):
        batch = read(segment, runs, timeout_s)
        if next(numbers) == number:
            failed = Batch(len(runs))
            failed.begin()
            for run in range(len(runs)):
                failed.fill(run, ReadStatus.FAILED if run >= place else ReadStatus.READ)
            failed.end()
            failed.finish(ReadStatus.FAILED)
            return failed
        return batch

    transfer.read = read_or_fail


@pytest.mark.parametrize("place", [0, 7])
def test_a_part_that_fails_while_the_last_one_is_verified_costs_its_own_pages_only(nodes, place):
    owner, reader = nodes
    fails_at(reader.transfer, 2, place)
    num_here = MAX_PART_PAGES + place
    statuses = reader.fetch(range(NUM_PAGES), owner)
    assert statuses == [FETCHED] * num_here + [FAILED] * (NUM_PAGES - num_here)
    assert reader.holds(range(num_here))
    assert reader.transfer.num_reads == 2, "a peer that fails is left alone"
    eventually(lambda: owner.core._peers.leases.num_slots == 0)
    statuses = reader.fetch(range(NUM_PAGES), owner)
    assert statuses == [PRESENT] * num_here + [FETCHED] * (NUM_PAGES - num_here)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_flipped_bit_in_any_part_is_found_before_its_page_may_be_read(nodes, part):
    owner, reader = nodes
    places = itertools.count()

    def flip(data):
        if next(places) == part * MAX_PART_PAGES + 5:
            data[77] ^= 4

    reader.transfer.on_wire = flip
    statuses = reader.fetch(range(NUM_PAGES), owner)
    num_here = part * MAX_PART_PAGES + 5
    assert statuses == [FETCHED] * num_here + [CORRUPT] * (NUM_PAGES - num_here)
    assert reader.locations([num_here]) == [None]
    assert owner.counts()["unconfirmed_corruption", ""] == 1


def test_the_next_part_is_leased_while_one_is_read_and_no_more(nodes):
    owner, reader = nodes
    leases = owner.core._peers.leases
    reader.transfer.go.clear()
    wait = reader.begin_fetch(range(NUM_PAGES), owner)
    eventually(lambda: leases.num_slots == 2 * MAX_PART_PAGES)
    reader.transfer.go.set()
    assert wait() == [FETCHED] * NUM_PAGES
    assert reader.holds(range(NUM_PAGES))
    assert owner.counts()["remote_leases", "granted"] == 3


def test_a_lease_that_ended_takes_its_part_and_what_was_to_follow(nodes):
    owner, reader = nodes
    leases = owner.core._peers.leases
    first = iter([True])
    reader.transfer.on_wire = lambda data: next(first, False) and reader.transfer.go.clear()
    wait = reader.begin_fetch(range(NUM_PAGES), owner)
    eventually(lambda: reader.transfer.num_reads == 2 and leases.num_slots == NUM_PAGES - MAX_PART_PAGES)
    (lost, *_) = leases._leases.values()
    owner.core._inbox.put(lambda: leases.lost(lost.identity))  # as after a cut link
    eventually(lambda: leases.num_slots == 0)
    reader.transfer.on_wire = None
    reader.transfer.go.set()
    assert wait() == [FETCHED] * MAX_PART_PAGES + [FAILED] * (NUM_PAGES - MAX_PART_PAGES)
    assert reader.holds(range(MAX_PART_PAGES))
    eventually(lambda: set(reader.fetch(range(NUM_PAGES), owner)) <= {PRESENT, FETCHED})


def test_a_peer_that_dies_within_a_part_leaves_what_was_given_back(nodes):
    owner, reader = nodes
    leases = owner.core._peers.leases
    first = iter([True])
    reader.transfer.on_wire = lambda data: next(first, False) and reader.transfer.go.clear()
    wait = reader.begin_fetch(range(NUM_PAGES), owner)
    eventually(lambda: reader.transfer.num_reads == 2 and leases.num_slots == NUM_PAGES - MAX_PART_PAGES)
    owner.stop()
    reader.transfer.on_wire = None
    reader.transfer.go.set()
    assert wait() == [FETCHED] * MAX_PART_PAGES + [FAILED] * (NUM_PAGES - MAX_PART_PAGES)
    assert reader.holds(range(MAX_PART_PAGES))


@pytest.mark.parametrize("num_lent", [MAX_PART_PAGES, MAX_PART_PAGES + 20, MAX_PART_PAGES - 20])
def test_a_peer_that_lends_one_part_at_once_lends_them_one_after_another(tmp_path, num_lent):
    num_slots = 4 * num_lent
    with two_nodes(tmp_path, {"config": config(num_slots)}, {"config": config(3_000)}) as (owner, reader):
        owner.commit(range(NUM_PAGES))
        assert owner.arena.spec.num_slots // 4 == num_lent
        assert reader.fetch(range(NUM_PAGES), owner) == [FETCHED] * NUM_PAGES
        assert reader.holds(range(NUM_PAGES))
        eventually(lambda: owner.core._peers.leases.num_slots == 0)
        assert owner.counts()["remote_leases", "granted"] <= 6


def test_a_fetch_given_up_within_a_part_gives_the_next_one_s_lease_back(nodes):
    owner, reader = nodes
    leases = owner.core._peers.leases
    reader.transfer.go.clear()
    wait = reader.begin_fetch(range(NUM_PAGES), owner, timeout_s=1.0)
    assert wait() == [TIMED_OUT] * NUM_PAGES
    assert leases.num_slots == 2 * MAX_PART_PAGES, "one part is read still"
    reader.transfer.go.set()
    eventually(lambda: leases.num_slots == 0)
    assert ("remote_leases", "fenced") not in owner.counts(), "over the connection as it is"
    eventually(lambda: set(reader.fetch(range(NUM_PAGES), owner)) <= {PRESENT, FETCHED})
