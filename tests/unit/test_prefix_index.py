"""The prefix index: events in order, gaps and incarnations fenced, recent decisions overlaid."""

from random import Random

import pytest

from cluster.router.prefix_index import PrefixIndex
from workers.protocol import KVEvent, KVEventBatch, ReplicaId

A, B = ReplicaId("a"), ReplicaId("b")


def keys(*numbers):
    return [bytes([n]) * 16 for n in numbers]


def stored(first, *numbers, incarnation=1):
    return KVEventBatch(incarnation, first, first + 1, [KVEvent("stored", keys(*numbers))])


@pytest.fixture
def index():
    index = PrefixIndex([A, B], overlay_s=10.0)
    index.restart(A, 1, 0, keys(1, 2))
    index.restart(B, 9, 0, [])
    return index


def test_only_leading_pages_count(index):
    index.apply(A, stored(0, 4))
    assert index.num_held(A, keys(1, 2, 3, 4), 0.0) == 2
    assert index.num_held(A, keys(3, 1), 0.0) == 0
    assert index.num_held(B, keys(1, 2), 0.0) == 0


def test_removed_pages_are_gone(index):
    assert index.apply(A, KVEventBatch(1, 0, 1, [KVEvent("removed", keys(2))]))
    assert index.num_held(A, keys(1, 2), 0.0) == 1


def test_a_gap_is_refused_until_a_snapshot_closes_it(index):
    assert index.apply(A, stored(0, 3))
    assert not index.apply(A, stored(5, 7))
    assert index.num_gaps == 1
    index.restart(A, 1, 6, keys(1, 2, 3, 7))
    assert index.apply(A, stored(6, 8))
    assert index.num_held(A, keys(1, 2, 3, 7, 8), 0.0) == 5


def test_another_incarnation_is_refused(index):
    assert not index.apply(A, stored(0, 3, incarnation=2))
    assert index.num_held(A, keys(3), 0.0) == 0


def test_a_lost_replica_holds_nothing(index):
    index.forget(A)
    assert index.num_held(A, keys(1), 0.0) == 0
    assert not index.apply(A, stored(0, 3))


def test_events_that_a_snapshot_already_had_change_nothing():
    """A snapshot may be ahead of the events still to come: replaying them ends in the same set."""
    random = Random(7)
    for _ in range(200):
        events, state, states = [], set(), [set()]
        for _ in range(12):
            kind = random.choice(["stored", "removed"])
            some = keys(*random.sample(range(6), 2))
            events.append(KVEvent(kind, some))
            state = state | set(some) if kind == "stored" else state - set(some)
            states.append(state)
        taken, ahead = sorted(random.sample(range(13), 2))
        index = PrefixIndex([A], overlay_s=0.0)
        index.restart(A, 1, taken, list(states[ahead]))  # as KVCacheManager.snapshot says it
        assert index.apply(A, KVEventBatch(1, taken, 12, events[taken:]))
        assert index._holdings[A].keys == state


def test_decisions_count_as_held_for_a_while_and_can_be_renewed(index):
    index.expect(B, keys(1, 2, 3), now_s=0.0)
    index.expect(B, keys(1), now_s=5.0)
    assert index.num_held(B, keys(1, 2, 3), 9.9) == 3
    assert index.num_held(B, keys(1, 2, 3), 10.0) == 1
    assert index.num_held(B, keys(1, 2, 3), 15.0) == 0


def test_switches_blind_the_index():
    index = PrefixIndex([A], overlay_s=0.0, takes_kv_events=False)
    index.restart(A, 1, 0, keys(1))
    assert index.apply(A, stored(0, 2))
    index.expect(A, keys(1, 2), now_s=0.0)
    assert index.num_held(A, keys(1, 2), 0.0) == 0
