"""A store over an arena that a killed server left: what is good or held stays, the rest is free."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cache_service.arena_format import SlotState
from cache_service.lease_row import LeaseRow
from cache_service.page_records import CommitStatus, Entry, Grant
from cache_service.page_store import PageStore, PageStoreOptions
from tests.unit.arenas import fill, key, kill, new_store, open_arena, spec, store_chain

WRITE_UNTIL_KILLED = """
import json, sys, time
from pathlib import Path
from cache_service.page_store import PageStore
from tests.unit.arenas import fill, key, open_arena, spec, store_chain
owned = open_arena(Path(sys.argv[1]), spec(bundle_bytes=1 << 20))
store = PageStore(owned.arena, [])
store_chain(store, owned.arena, "ab")
granted = store.grant(1, 2)
print(json.dumps([[grant.slot, grant.epoch] for grant in granted]), flush=True)
while True:
    fill(owned.arena, granted[0].slot, key("half written"))
"""


def test_kill_while_writing_leaves_the_pages_and_drops_the_grants(tmp_path):
    popen = subprocess.Popen([sys.executable, "-c", WRITE_UNTIL_KILLED, tmp_path], stdout=subprocess.PIPE)
    granted = [Grant(*fields) for fields in json.loads(popen.stdout.readline())]
    time.sleep(0.05)
    popen.send_signal(signal.SIGKILL)
    popen.wait(10)
    popen.stdout.close()
    owned = open_arena(tmp_path, spec(bundle_bytes=1 << 20))
    assert owned.is_adopted and owned.arena.state(granted[0].slot) is SlotState.WRITING
    store = PageStore(owned.arena, [])
    store.check()
    assert (store.num_ready, store.num_recovered, store.num_writing, store.num_free) == (2, 2, 0, 6)
    assert None not in store.lookup([key("a"), key("b")])
    entry = Entry(granted[0].slot, granted[0].epoch, key("half written"), None, 16)
    assert store.commit(1, [entry])[0].status is CommitStatus.STALE
    assert all(grant.epoch > granted[0].epoch for grant in store.grant(1, 6) if grant.slot == granted[0].slot)
    owned.close()


def restarted(tmp_path, owned, **fields):
    options, live_groups = fields.pop("options", None), fields.pop("live_groups", ())
    kill(owned)
    again = open_arena(tmp_path, spec(**fields))
    assert again.is_adopted
    changes = []
    store = PageStore(again.arena, changes, options, live_groups)
    store.check()
    return again, store, changes


def test_the_changes_of_a_restarted_store_begin_with_all_it_has_parents_first(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abc")
    store.drop(store.lookup(keys)[2], "corrupt")
    store_chain(store, owned.arena, "xy", parent=keys[1])
    before = sorted(store.stored(), key=repr)
    owned, store, changes = restarted(tmp_path, owned)
    assert sorted(changes, key=repr) == before
    assert [change.key for change in changes] == [key(name) for name in "abxy"]
    owned.close()


def test_grants_of_a_living_group_stay_its_own_through_a_restart(tmp_path):
    """It may be copying into them this moment: they are nobody else's before it says so or is dead."""
    owned, store, _ = new_store(tmp_path)
    kept, lost = store.grant(4, 2), store.grant(5, 2)
    owned, store, _ = restarted(tmp_path, owned, live_groups={4})
    assert (store.num_granted(4), store.num_granted(5), store.num_free) == (2, 0, 6)
    fill(owned.arena, kept[0].slot, key("a"))
    entry = Entry(kept[0].slot, kept[0].epoch, key("a"), None, 16)
    assert store.commit(4, [entry])[0].status is CommitStatus.COMMITTED
    assert store.abort(4, [kept[1]]) == 1 and store.abort(5, lost) == 0
    store.check()
    owned.close()


def test_slots_that_readers_hold_are_not_granted_after_a_restart(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "ab")
    locations = store.lookup(keys)
    reader = LeaseRow(owned.arena, 1)
    assert reader.acquire(keys, locations) == 2
    store.drop(locations[1], "corrupt")
    again, store, _ = restarted(tmp_path, owned)
    assert (store.num_ready, store.num_draining, store.num_free) == (1, 1, 6)
    assert len(store.grant(1, 8)) == 6
    again.arena.leases[1] = 0
    assert len(store.grant(1, 8)) == 2
    again.close()


def test_a_page_whose_prefix_is_gone_is_not_taken_over(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abc")
    slot = store.lookup(keys)[1].slot
    owned.arena.set_stamp(slot, owned.arena.epoch(slot), SlotState.EVICTING)
    owned, store, _ = restarted(tmp_path, owned)
    assert [location is not None for location in store.lookup(keys)] == [True, False, False]
    owned.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", 7),
        ("layout", 7),
        ("stamp", (5 << 2) | SlotState.READY),
        ("stamp", 2**64 - 1),
        ("key", key("b")),
    ],
)
def test_headers_that_make_no_sense_are_not_taken_over(tmp_path, field, value):
    owned, store, _ = new_store(tmp_path)
    store_chain(store, owned.arena, "b")
    (location,) = store.lookup(store_chain(store, owned.arena, "a"))
    owned.arena.headers[field][location.slot] = value
    owned, store, _ = restarted(tmp_path, owned)
    assert store.num_ready == 1 and store.lookup([key("b")]) != [None]
    assert len(store.grant(1, 8)) == 8
    store.check()
    owned.close()


def test_a_smaller_quota_after_a_restart_is_kept(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abcdef")
    owned, store, _ = restarted(tmp_path, owned, options=PageStoreOptions(tenant_ratio=0.5))
    assert [location is not None for location in store.lookup(keys)] == [True] * 4 + [False] * 2
    owned.close()


def test_a_large_arena_is_taken_over_within_its_time_and_memory(tmp_path):
    """2 GB of 64 KiB pages: 32,768 headers. Their bytes are not read."""
    num_slots = 32_768
    owned = open_arena(tmp_path, spec(num_slots=num_slots, num_readers=64))
    store = PageStore(owned.arena, [])
    for start in range(0, num_slots, 64):
        granted = store.grant(1, 64)
        entries = []
        for place, grant in enumerate(granted):
            owned.arena.set_checksum(grant.slot, 0, 1)
            parent = key(start + place - 1) if place else None
            entries.append(Entry(grant.slot, grant.epoch, key(start + place), parent, 16))
        store.commit(1, entries)
    kill(owned)
    owned = open_arena(tmp_path, spec(num_slots=num_slots, num_readers=64))
    started = time.process_time()
    store = PageStore(owned.arena, [])
    assert time.process_time() - started < 3
    assert store.num_ready == num_slots
    owned.close()


BYTES_PER_PAGE = """
import sys, tracemalloc
from pathlib import Path
from cache_service.page_records import Entry
from cache_service.page_store import PageStore
from tests.unit.arenas import key, open_arena, spec
class Forgetful:
    def append(self, change): pass
num_slots = 30_000
owned = open_arena(Path(sys.argv[1]), spec(num_slots=num_slots, num_readers=64))
tracemalloc.start()
store = PageStore(owned.arena, Forgetful())
most = 0
for start in range(0, num_slots, 50):
    granted = store.grant(1, 50)
    for grant in granted:
        owned.arena.set_checksum(grant.slot, 0, 1)
    store.commit(1, [Entry(g.slot, g.epoch, key(start + i), None, 16) for i, g in enumerate(granted)])
    most = max(most, tracemalloc.get_traced_memory()[0])
assert store.num_ready == num_slots
print(most / num_slots)
owned.close()
"""


def test_the_store_takes_at_most_300_bytes_a_page(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", BYTES_PER_PAGE, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert 50 < float(run.stdout) <= 300, run.stdout
