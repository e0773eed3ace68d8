"""Calls to a peer, and their answers, late, damaged or lost: misses in time at worst; no lease is left."""

import pytest

from cache_service.injection import MessageInjection
from cache_service.messages import FetchStatus
from tests.unit.cache_nodes import eventually
from tests.unit.peer_nodes import two_nodes

FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus
NUM_PAGES = 8
HERE = {FETCHED, PRESENT}


@pytest.mark.parametrize(
    ("injection", "happens", "misses"),
    [
        (MessageInjection(1, delay_ratio=1.0, max_delay_s=0.02), "late", False),
        (MessageInjection(2, loss_ratio=0.3), "lost", True),
        (MessageInjection(3, damage_ratio=0.3), "damaged", True),
    ],
    ids=["late", "lost", "damaged"],
)
def test_a_call_that_goes_wrong_is_a_miss_in_time_and_the_next_one_is_not(
    tmp_path, injection, happens, misses
):
    with two_nodes(tmp_path, reader={"peer_injection": injection}) as (owner, reader):
        owner.commit(range(NUM_PAGES))
        statuses = []
        for num_pages in range(1, NUM_PAGES + 1):
            statuses += reader.fetch(range(num_pages), owner, timeout_s=0.4 if misses else 20.0)
        assert (set(statuses) <= HERE) == (not misses)
        eventually(lambda: set(reader.fetch(range(NUM_PAGES), owner, 0.4)) <= HERE)
        assert reader.holds(range(NUM_PAGES))
        (source,) = reader.core._peers.peers._sources.values()
        counts = source._connection.injected.counts
        assert all(counts[way, happens] for way in ("sent", "heard")), counts
        eventually(lambda: owner.core._peers.leases.num_slots == 0)
        assert reader.stats().num_writing == 0
        owner.check()
        reader.check()
