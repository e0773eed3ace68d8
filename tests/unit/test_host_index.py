"""The host index: what the nodes' arenas and the remote store have of a prompt, seen from each replica."""

import pytest

from cache_service.config import CacheConfig
from cache_service.relocation_records import (
    AllRemovedRemotely,
    Removed,
    RemovedRemotely,
    Stored,
    StoredRemotely,
)
from cluster.router.host_index import CacheAddress, FetchScope, HostIndex, NodePages
from cluster.router.ways import Residence
from workers.protocol import FetchHint, ReplicaId

A, B, LONE = ReplicaId("a"), ReplicaId("b"), ReplicaId("lone")
KEYS = [bytes([n]) * 16 for n in range(10)]


class Node:
    def __init__(self, name):
        self.address = CacheAddress(name, f"tcp://{name}:1", f"tcp://{name}:2")
        self.pages = NodePages()
        self.speaks = True

    def is_heard(self, now_s):
        return self.speaks


def stored(first, end):
    return [Stored(KEYS[n], KEYS[n - 1] if n else None, n, 2) for n in range(first, end)]


def stored_remotely(first, end):
    return [StoredRemotely(key) for key in KEYS[first:end]]


@pytest.fixture
def nodes():
    return Node("a"), Node("b")


@pytest.fixture
def index(nodes):
    return HostIndex({A: nodes[0], B: nodes[1]}, FetchScope())


def test_pages_come_and_go_by_snapshot_and_changes():
    pages = NodePages()
    pages.restart([*stored(0, 4), *stored_remotely(2, 5)])
    assert (pages.num_in_arena, pages.num_remote, pages.num_leading(KEYS)) == (4, 3, 4)
    pages.apply([*stored(4, 6), Removed(KEYS[5], 5, 2), RemovedRemotely(KEYS[2]), StoredRemotely(KEYS[7])])
    assert (pages.num_in_arena, pages.num_remote, pages.num_leading(KEYS)) == (5, 3, 5)
    assert [pages.is_remote(key) for key in (KEYS[2], KEYS[7])] == [False, True]
    pages.apply([AllRemovedRemotely()])
    assert (pages.num_in_arena, pages.num_remote, pages.num_leading(KEYS)) == (5, 0, 5)
    pages.restart([])
    assert (pages.num_in_arena, pages.num_remote, pages.num_leading(KEYS)) == (0, 0, 0)


@pytest.mark.parametrize("num", range(11))
def test_leading_pages_are_counted_whatever_their_number(num):
    pages = NodePages()
    pages.apply(stored(0, num))
    assert pages.num_leading(KEYS) == num
    assert pages.num_leading([]) == 0


def test_a_replica_sees_its_own_nodes_arena(index, nodes):
    nodes[0].pages.apply(stored(0, 4))
    assert index.residence(A, KEYS, 1, 0.0) == Residence(1, 4, [])
    assert index.residence(B, KEYS, 1, 0.0) == Residence(1, 0, [FetchHint("tcp://a:1", 4)])


def test_replicas_of_one_node_see_the_same_arena(nodes):
    nodes[0].pages.apply(stored(0, 4))
    index = HostIndex({A: nodes[0], B: nodes[0]}, FetchScope())
    assert index.residence(B, KEYS, 0, 0.0) == Residence(0, 4, [])


@pytest.mark.parametrize(("num_on_device", "num_in_arena"), [(6, 0), (0, 6), (7, 2), (2, 7)])
def test_only_sources_beyond_device_and_arena_are_told(index, nodes, num_on_device, num_in_arena):
    nodes[0].pages.apply([*stored(0, num_in_arena), *stored_remotely(0, 6)])
    nodes[1].pages.apply(stored(0, 6))
    assert index.residence(A, KEYS, num_on_device, 0.0).elsewhere == []
    nodes[1].pages.apply(stored(6, 9))
    assert index.residence(A, KEYS, num_on_device, 0.0).elsewhere == [FetchHint("tcp://b:1", 9)]


def test_the_store_continues_the_arena(index, nodes):
    nodes[0].pages.apply([*stored(0, 3), *stored_remotely(3, 8)])
    assert index.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, 8)]
    nodes[0].pages.apply([RemovedRemotely(KEYS[5])])
    assert index.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, 5)]
    nodes[0].pages.apply([RemovedRemotely(KEYS[3])])
    assert index.residence(A, KEYS, 0, 0.0).elsewhere == []


def test_what_the_device_alone_has_does_not_bridge_a_gap_before_the_store(index, nodes):
    """The arena takes no page without its parent, so what follows the gap cannot be fetched."""
    nodes[0].pages.apply([*stored(0, 2), *stored_remotely(4, 9)])
    assert index.residence(A, KEYS, 4, 0.0).elsewhere == []


def test_a_shared_store_is_what_all_nodes_put_there_and_a_nodes_own_is_not(nodes):
    nodes[0].pages.apply(stored_remotely(0, 2))
    nodes[1].pages.apply(stored_remotely(2, 5))
    shared = HostIndex({A: nodes[0], B: nodes[1]}, FetchScope(is_store_shared=True))
    assert shared.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, 5)]
    apart = HostIndex({A: nodes[0], B: nodes[1]}, FetchScope(is_store_shared=False))
    assert apart.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, 2)]
    assert apart.residence(B, KEYS, 0, 0.0).elsewhere == []


def test_a_store_attached_later_is_as_its_address_says(nodes):
    nodes[0].pages.apply(stored_remotely(0, 2))
    nodes[1].pages.apply(stored_remotely(2, 5))
    index = HostIndex({A: nodes[0], B: nodes[1]}, FetchScope())
    for store, num_pages in (("disk:/pages?gb=1", 2), ("mooncake:host:1?segment_gb=1", 5)):
        index.use_store(store)
        assert index.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, num_pages)]


def test_nodes_that_do_not_read_each_other_are_not_told_of_peers(nodes):
    nodes[1].pages.apply([*stored(0, 4), *stored_remotely(0, 2)])
    index = HostIndex({A: nodes[0], B: nodes[1]}, FetchScope(reads_peers=False))
    assert index.residence(A, KEYS, 0, 0.0).elsewhere == [FetchHint(None, 2)]


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ({}, FetchScope(reads_peers=False, is_store_shared=True)),
        ({"transfer": "tcp"}, FetchScope(reads_peers=True, is_store_shared=True)),
        ({"store": "disk:/pages?gb=1"}, FetchScope(reads_peers=False, is_store_shared=False)),
        ({"store": "mooncake:host:1?segment_gb=1"}, FetchScope(reads_peers=False, is_store_shared=True)),
    ],
)
def test_the_configuration_says_from_where_nodes_can_fetch(options, scope):
    assert FetchScope.of(CacheConfig(host_cache_gb=1, **options)) == scope


def test_what_a_silent_server_told_counts_for_nothing(index, nodes):
    nodes[0].pages.apply([*stored(0, 4), *stored_remotely(0, 6)])
    nodes[1].pages.apply(stored(0, 2))
    nodes[0].speaks = False
    assert index.residence(B, KEYS, 0, 0.0) == Residence(0, 2, [])
    # Nor is anything fetched through it.
    assert index.residence(A, KEYS, 1, 0.0) == Residence(1)
    nodes[0].speaks = True
    assert index.residence(B, KEYS, 0, 0.0).elsewhere == [FetchHint("tcp://a:1", 4), FetchHint(None, 6)]


def test_a_replica_without_a_cache_server_has_its_device(index, nodes):
    nodes[0].pages.apply(stored(0, 4))
    assert index.residence(LONE, KEYS, 3, 0.0) == Residence(3)
