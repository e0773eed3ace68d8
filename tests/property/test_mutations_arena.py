"""Each mechanism of the arena, switched off alone, makes a named check fire; with all on, none does.

The fence's own test is test_fence.py: only processes that run at full speed show what it is for.
"""

import random
import subprocess
import sys
import time

import pytest

from cache_service.arena_safety import ArenaSafety
from cache_service.lease_row import LeaseRow
from cache_service.page_records import CommitStatus
from cache_service.processes import ProcessId, ProcessWatch
from cache_service.reader_rows import ReaderRows
from tests.property.arena_node import ArenaNode, random_action
from tests.unit.arenas import new_store, store_chain

SEEDS = range(8)


def drive(folder, seed, safety, num_actions=400):
    """Random actions, everything checked after each; return the node, closed."""
    node, chance = ArenaNode(folder, safety), random.Random(seed)
    try:
        for _ in range(num_actions):
            random_action(node, chance)
            node.check()
    finally:
        node.close()
    return node


def test_with_everything_on_no_check_fires_and_everything_happens(tmp_path):
    nodes = [drive(tmp_path, seed, ArenaSafety()) for seed in SEEDS]
    assert {status for node in nodes for status in node.statuses} == set(CommitStatus)
    assert sum(node.store.num_refused for node in nodes) > 0
    assert sum(node.store.num_evicted for node in nodes) > 0
    assert sum(node.store.num_recovered for node in nodes) > 0


@pytest.mark.parametrize(
    ("switch", "check"),
    [
        ("leases", r"lease: slot \d is given away under its reader"),
        ("epochs", r"epoch: slot \d is not what its reader was told"),
        ("children_first", r"a child without its parent"),
        ("whole_pages", r"slot \d lacks a rank's bundle"),
        ("grants", r"slot \d is [A-Z]+ and [A-Z]+ at once|was taken from its group|lost some"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(tmp_path, switch, check):
    with pytest.raises(AssertionError, match=check):
        for seed in SEEDS:
            drive(tmp_path, seed, ArenaSafety(**{switch: False}))


def lose_one_of_a_group(folder, *, proven_death):
    """One of two processes dies; what the other has leased is asked for by somebody else."""
    owned, store, _ = new_store(folder, ArenaSafety(proven_death=proven_death))
    rows = ReaderRows(owned.arena, ProcessWatch())
    leader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    group = rows.attach(ProcessId.of(leader.pid), None).group
    row = LeaseRow(owned.arena, rows.attach(ProcessId.current(), group).row)
    keys = store_chain(store, owned.arena, "a")
    (location,) = store.lookup(keys)
    assert row.acquire(keys, [location]) == 1
    leader.stdin.close()
    leader.wait(10)
    end = time.monotonic() + 10
    while not rows.take_dead_groups() and not proven_death and time.monotonic() < end:
        time.sleep(0.01)
    store.grant(9, 8)
    is_current = row.is_current(location)
    owned.close()
    assert is_current, "lease: it is taken back while a process of its group lives"


def test_leases_of_a_group_taken_back_at_its_first_death_are_missed(tmp_path):
    (tmp_path / "on").mkdir()
    lose_one_of_a_group(tmp_path / "on", proven_death=True)
    with pytest.raises(AssertionError, match="lease: it is taken back while a process of its group lives"):
        lose_one_of_a_group(tmp_path, proven_death=False)
