"""Each mechanism that keeps fetched pages right, switched off alone, makes a named check fire."""

import itertools
import random

import pytest

from cache_service import messages
from cache_service.arena_safety import ArenaSafety
from cache_service.in_process_transfer import InProcessNetwork
from cache_service.messages import FetchStatus
from tests.property.peer_traffic import PeerTraffic
from tests.unit.cache_nodes import eventually
from tests.unit.peer_nodes import lease, two_nodes
from tests.unit.raw_cache_client import RawClient

NUM_SEEDS, MAX_SEEDS = 6, 60
NUM_ACTIONS = 60


def drive(folder, seed, safety, flips):
    """Random traffic, everything checked after each action; return what became of fetched pages."""
    folder = folder / f"{seed}-{flips}"
    folder.mkdir()
    traffic = PeerTraffic(InProcessNetwork(), folder, safety, random.Random(seed), flips)
    try:
        for _ in range(NUM_ACTIONS):
            traffic.act()
        traffic.settle()
    finally:
        traffic.close()
    return traffic.statuses


def test_with_everything_on_no_check_fires_and_everything_happens(tmp_path):
    statuses, expected = set(), set(FetchStatus) - {FetchStatus.NO_SLOT}
    for seed in itertools.count():
        if seed >= NUM_SEEDS and (statuses >= expected or seed == MAX_SEEDS):
            break
        statuses |= drive(tmp_path, seed, ArenaSafety(), flips=seed % 2 == 1)
    assert statuses >= expected, "how much happens in a window of time is the machine's affair"


@pytest.mark.parametrize(
    ("switch", "flips", "check"),
    [
        ("remote_leases", False, "lease: a page went while a peer read it"),
        ("verification", True, r"bytes: slots \[.*\] are readable and hold what their keys do not say"),
        ("quiet", False, r"bytes: slots \[.*\] are readable and hold what their keys do not say"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(tmp_path, switch, flips, check):
    with pytest.raises(AssertionError, match=check):
        for seed in range(20):
            drive(tmp_path, seed, ArenaSafety(**{switch: False}), flips)


def lose_a_reader_that_reads_on(folder, safety):
    folder.mkdir()
    with two_nodes(folder, {"safety": safety}, {"safety": safety}) as (owner, reader):
        leases = owner.core._peers.leases
        reader.transfer.go.clear()
        wait = reader.begin_fetch("abc", owner)
        eventually(lambda: reader.transfer.num_reads)
        (lost,) = leases._leases.values()
        owner.core._inbox.put(lambda: leases.lost(lost.identity))
        eventually(lambda: leases.num_slots == 0)
        reader.transfer.go.set()
        counts = wait() != [FetchStatus.FAILED] * 3
        node, incarnation = lost.reader
        with RawClient(owner.server) as again:
            answer = again.ask(lease("abc", incarnation, reader=node))
        leases_again = not (isinstance(answer, messages.Refused) and answer.code == "fenced")
        assert not counts and not leases_again, (
            f"lost: its pages count {counts}, it leases again {leases_again}"
        )


def test_what_a_lost_reader_reads_on_is_noticed(tmp_path):
    lose_a_reader_that_reads_on(tmp_path / "on", ArenaSafety())
    with pytest.raises(AssertionError, match="lost: its pages count True, it leases again True"):
        lose_a_reader_that_reads_on(tmp_path / "off", ArenaSafety(fencing=False))
