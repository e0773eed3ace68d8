"""Leases: what a reader holds is not reused, until it lets go or is proven dead."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cache_service.arena import Arena
from cache_service.arena_safety import ArenaSafety
from cache_service.lease_row import LeaseRow
from cache_service.page_store import PageStore
from cache_service.processes import ProcessId, ProcessWatch
from cache_service.reader_rows import NoReaderRowError, ReaderRows
from tests.unit.arenas import key, kill, new_store, open_arena, spec, store_chain


def readers(owned, num_rows=2):
    return [LeaseRow(owned.arena, row) for row in range(num_rows)]


def test_a_leased_page_is_not_evicted_and_one_let_go_is(tmp_path):
    owned, store, _ = new_store(tmp_path, num_slots=2)
    keys = store_chain(store, owned.arena, "ab")
    locations = store.lookup(keys)
    first, second = readers(owned)
    assert first.acquire(keys, locations) == second.acquire(keys, locations) == 2
    assert store.grant(1, 2) == []
    assert store.num_refused > 0
    store.check()
    first.release([location.slot for location in locations])
    assert store.grant(1, 2) == []
    assert second.is_current(locations[0]) and second.is_current(locations[1])
    second.release([locations[1].slot])
    assert [grant.slot for grant in store.grant(1, 2)] == [locations[1].slot]
    assert not first.is_current(locations[1])
    store.check()
    owned.close()


def test_leases_count_within_a_process(tmp_path):
    owned, store, _ = new_store(tmp_path, num_slots=1)
    keys = store_chain(store, owned.arena, "a")
    locations = store.lookup(keys)
    (reader,) = readers(owned, 1)
    for _ in range(3):
        assert reader.acquire(keys, locations) == 1
    for _ in range(3):
        assert store.grant(1, 1) == []
        assert reader.num_leased == 1
        reader.release([locations[0].slot])
    assert reader.num_leased == 0
    assert len(store.grant(1, 1)) == 1
    owned.close()


def test_acquire_takes_the_longest_prefix_that_is_there(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abcd")
    locations = store.lookup(keys)
    (reader,) = readers(owned, 1)
    store.drop(locations[2], "corrupt")
    assert reader.acquire(keys, locations) == 2
    assert reader.num_leased == 2
    assert list(owned.arena.leases[0].nonzero()[0]) == sorted(location.slot for location in locations[:2])
    assert reader.acquire([], []) == 0
    owned.close()


@pytest.mark.parametrize("what", ["epoch", "key", "granted", "free"])
def test_a_slot_that_is_not_what_the_reader_was_told_is_a_miss(tmp_path, what):
    owned, store, _ = new_store(tmp_path, num_slots=1)
    keys = store_chain(store, owned.arena, "a")
    locations = store.lookup(keys)
    if what == "epoch":
        store.grant(1, 1)
        store.reclaim(1)
        store_chain(store, owned.arena, "a")
    elif what == "key":
        keys = [key("b")]
    elif what == "granted":
        store.grant(1, 1)
    else:
        store.clear()
    (reader,) = readers(owned, 1)
    assert reader.acquire(keys, locations) == 0
    assert not owned.arena.leases.any()
    owned.close()


def test_a_dropped_page_keeps_its_slot_until_its_reader_is_done(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "ab")
    locations = store.lookup(keys)
    first, second = readers(owned)
    assert first.acquire(keys, locations) == 2
    assert store.drop(locations[0], "corrupt") == 2
    store.check()
    assert (store.num_ready, store.num_draining, store.num_free) == (0, 2, 6)
    assert second.acquire(keys, locations) == 0
    assert first.is_current(locations[0]), "its bytes are as they were"
    assert len(store.grant(1, 8)) == 6
    first.release([location.slot for location in locations])
    assert store.maintain(8) == 0
    assert (store.num_draining, store.num_free) == (0, 2)
    store.check()
    owned.close()


class MeddledArena(Arena):
    """An arena in which a reader comes just after the evictor has looked for leases."""

    def is_leased(self, slot):
        found = super().is_leased(slot)
        self.meet()
        return found


@pytest.mark.parametrize(("marks_first", "num_acquired"), [(True, 0), (False, 1)])
def test_a_reader_that_comes_after_the_look_for_leases_finds_the_mark(tmp_path, marks_first, num_acquired):
    owned = open_arena(tmp_path)
    arena = MeddledArena.map(owned.arena.path, spec(), ArenaSafety(marks_first=marks_first))
    store = PageStore(arena, [])
    keys = store_chain(store, arena, "a")
    locations = store.lookup(keys)
    (reader,) = readers(owned, 1)
    acquired = []
    arena.meet = lambda: acquired.append(reader.acquire(keys, locations))
    assert len(store.grant(1, 8)) == 8
    assert acquired == [num_acquired]
    assert reader.num_leased == num_acquired, "a lease on a slot that is granted: bytes change under it"
    arena.close()
    owned.close()


READ_AND_SLEEP = """
import sys, time
from pathlib import Path
from cache_service.arena import Arena
from cache_service.lease_row import LeaseRow
from cache_service.page_records import Location
from tests.unit.arenas import key, spec
row = LeaseRow(Arena.map(Path(sys.argv[1]), spec()), int(sys.argv[2]))
assert row.acquire([key("a")], [Location(int(sys.argv[3]), int(sys.argv[4]))]) == 1
print("leased", flush=True)
time.sleep(60)
"""


def reader_process(owned, rows, location, group=None):
    """A process with a row of its own that leases page "a" and holds it."""
    code = "import sys; sys.stdin.readline(); sys.argv = sys.stdin.readline().split()\n" + READ_AND_SLEEP
    popen = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    row = rows.attach(ProcessId.of(popen.pid), group)
    popen.stdin.write(f"\n- {owned.arena.path} {row.row} {location.slot} {location.epoch}\n".encode())
    popen.stdin.flush()
    assert popen.stdout.readline() == b"leased\n"
    return popen, row


def kill_process(popen):
    popen.send_signal(signal.SIGKILL)
    popen.wait(10)
    popen.stdin.close()
    popen.stdout.close()


def dead_groups(rows, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if groups := rows.take_dead_groups():
            return groups
        time.sleep(0.01)
    return []


def test_a_dead_readers_leases_go_with_it_and_not_before(tmp_path):
    owned, store, _ = new_store(tmp_path, num_slots=8)
    keys = store_chain(store, owned.arena, "a")
    (location,) = store.lookup(keys)
    rows = ReaderRows(owned.arena, ProcessWatch())
    popen, row = reader_process(owned, rows, location)
    store.grant(row.group, 3)
    assert rows.num_leases() == {row.group: 1}
    assert rows.take_dead_groups() == []
    assert len(store.grant(9, 8)) == 4, "all but the leased one"
    kill_process(popen)
    assert dead_groups(rows) == [row.group]
    assert store.reclaim(row.group) == 3
    assert rows.groups == set() and not owned.arena.leases.any()
    assert len(store.grant(9, 8)) == 4
    store.check()
    owned.close()


def test_a_groups_leases_stay_while_one_of_its_ranks_lives(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "a")
    (location,) = store.lookup(keys)
    rows = ReaderRows(owned.arena, ProcessWatch())
    leader, row = reader_process(owned, rows, location)
    follower, other = reader_process(owned, rows, location, row.group)
    assert (other.group, len(rows.processes)) == (row.group, 2)
    kill_process(leader)
    assert dead_groups(rows, 0.3) == []
    assert owned.arena.leases[row.row].sum() == 1, "the other rank may be copying from the page"
    kill_process(follower)
    assert dead_groups(rows) == [row.group]
    assert not owned.arena.leases.any()
    owned.close()


def test_rows_are_given_once_and_again_after_leaving(tmp_path):
    owned = open_arena(tmp_path)
    rows = ReaderRows(owned.arena, ProcessWatch())
    me = ProcessId.current()
    mine = rows.attach(me, None)
    assert rows.attach(me, None) == mine
    assert rows.attach(ProcessId.of(os.getppid()), 77) == (mine.row + 1, 77)
    assert rows.groups == {mine.group, 77}
    rows.leave(me)
    rows.leave(ProcessId(os.getppid(), 1))
    assert rows.attach(me, None) == mine, "back before it was cleared"
    assert rows.take_dead_groups() == []
    rows.leave(me)
    assert rows.take_dead_groups() == [mine.group]
    again = rows.attach(me, None)
    assert again.row == mine.row and again.group not in (mine.group, 77)
    owned.close()


@pytest.mark.parametrize("num_words", [0, 1, 2])
def test_a_row_half_written_by_a_server_that_was_killed_is_nobody_s(tmp_path, num_words, monkeypatch):
    owned = open_arena(tmp_path)
    write, written = owned.arena.set_row_word, []

    def die(row, word, value):
        if len(written) == num_words:
            raise InterruptedError("killed")
        written.append(word)
        write(row, word, value)

    monkeypatch.setattr(owned.arena, "set_row_word", die)
    with pytest.raises(InterruptedError):
        ReaderRows(owned.arena, ProcessWatch()).attach(ProcessId.current(), 77)
    monkeypatch.undo()
    rows = ReaderRows(owned.arena, ProcessWatch())
    assert rows.groups == set()
    assert rows.attach(ProcessId.current(), 77).group == 77
    owned.close()


def test_more_readers_than_rows_are_refused(tmp_path):
    owned = open_arena(tmp_path)
    rows = ReaderRows(owned.arena, ProcessWatch())
    sleepers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(5)]
    for popen in sleepers[:4]:
        rows.attach(ProcessId.of(popen.pid), None)
    with pytest.raises(NoReaderRowError, match=r"all 4 reader rows of .* run fewer workers"):
        rows.attach(ProcessId.of(sleepers[4].pid), None)
    for popen in sleepers:
        popen.stdin.close()
        popen.wait(10)
    owned.close()


def test_a_restarted_server_keeps_rows_of_the_living_and_clears_those_of_the_dead(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "a")
    (location,) = store.lookup(keys)
    rows = ReaderRows(owned.arena, ProcessWatch())
    living, row = reader_process(owned, rows, location)
    dying, _ = reader_process(owned, rows, location)
    kill(owned)
    kill_process(dying)
    again = open_arena(tmp_path)
    rows = ReaderRows(again.arena, ProcessWatch())
    assert rows.groups == {row.group}
    assert again.arena.leases.sum() == 1
    assert rows.attach(ProcessId.current(), None).group > row.group
    kill_process(living)
    assert dead_groups(rows) == [row.group]
    again.close()
