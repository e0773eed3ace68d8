"""PageStore: grants, commits of whole pages, duplicates, quotas, pins, drops."""

import msgspec
import pytest

from cache_service.arena_format import SlotState
from cache_service.page_records import CommitStatus, Entry, Grant, Location
from cache_service.page_store import PageStore, PageStoreOptions
from cache_service.pins import PinBudgetError
from cache_service.relocation_records import Removed, Stored
from tests.unit.arenas import fill, key, new_store, open_arena, spec, store_chain


def commit(store, arena, grant, name, parent=None, group=1, tenant=0, written=True):
    if written:
        fill(arena, grant.slot, key(name))
    (result,) = store.commit(group, [Entry(grant.slot, grant.epoch, key(name), parent, 16, tenant)])
    store.check()
    return result


def test_a_page_goes_from_grant_to_lookup(tmp_path):
    owned, store, changes = new_store(tmp_path, num_ranks=2)
    (grant,) = store.grant(1, 1)
    assert owned.arena.state(grant.slot) is SlotState.WRITING
    assert grant.epoch % 2 == 1
    assert store.lookup([key("a")]) == [None]
    result = commit(store, owned.arena, grant, "a")
    assert result.status is CommitStatus.COMMITTED
    assert result.location == Location(grant.slot, grant.epoch + 1)
    assert store.lookup([key("a"), key("b")]) == [result.location, None]
    assert changes == [Stored(key("a"), None, grant.slot, grant.epoch + 1)] == list(store.stored())
    assert (owned.arena.key(grant.slot), owned.arena.parent(grant.slot)) == (key("a"), None)
    assert (owned.arena.length(grant.slot), owned.arena.tenant(grant.slot)) == (16, 0)
    owned.close()


def test_grants_are_of_different_slots_and_end_with_the_arena(tmp_path):
    owned, store, _ = new_store(tmp_path)
    granted = store.grant(1, 5) + store.grant(2, 5)
    assert sorted(grant.slot for grant in granted) == list(range(8))
    assert (store.num_granted(1), store.num_granted(2), store.num_free) == (5, 3, 0)
    assert store.grant(1, 1) == []
    store.check()
    owned.close()


def test_slots_not_usable_yet_are_not_granted(tmp_path):
    owned = open_arena(tmp_path, spec(), prefault=False)
    store = PageStore(owned.arena, [])
    assert store.grant(1, 8) == []
    owned.arena.num_usable_slots = 3
    assert sorted(grant.slot for grant in store.grant(1, 8)) == [0, 1, 2]
    owned.arena.num_usable_slots = 5
    assert store.maintain(8) == 0
    assert store.num_free == 2
    store.check()
    owned.close()


def test_the_first_writer_of_a_key_wins_and_the_second_slot_is_free_again(tmp_path):
    owned, store, changes = new_store(tmp_path)
    first, second = store.grant(1, 1) + store.grant(2, 1)
    location = commit(store, owned.arena, first, "a").location
    result = commit(store, owned.arena, second, "a", group=2)
    assert (result.status, result.location) == (CommitStatus.DUPLICATE, location)
    assert (store.num_free, store.num_writing, len(changes)) == (7, 0, 1)
    owned.close()


def test_a_grant_is_committed_only_by_its_group_and_once(tmp_path):
    owned, store, _ = new_store(tmp_path)
    (grant,) = store.grant(1, 1)
    assert commit(store, owned.arena, grant, "a", group=2).status is CommitStatus.STALE
    assert commit(store, owned.arena, Grant(grant.slot, 3), "a").status is CommitStatus.STALE
    assert commit(store, owned.arena, Grant(99, 1), "a", written=False).status is CommitStatus.STALE
    assert store.num_granted(1) == 1
    assert commit(store, owned.arena, grant, "a").status is CommitStatus.COMMITTED
    assert commit(store, owned.arena, grant, "b").status is CommitStatus.STALE
    owned.close()


def test_an_aborted_grant_cannot_be_committed(tmp_path):
    owned, store, _ = new_store(tmp_path)
    granted = store.grant(1, 2)
    assert store.abort(2, granted) == 0
    assert store.abort(1, granted + granted) == 2
    assert commit(store, owned.arena, granted[0], "a").status is CommitStatus.STALE
    (again,) = store.grant(1, 1)
    assert again.slot == granted[1].slot and again.epoch == granted[1].epoch + 2
    owned.close()


def test_a_page_needs_the_page_that_it_continues(tmp_path):
    owned, store, _ = new_store(tmp_path)
    (grant,) = store.grant(1, 1)
    result = commit(store, owned.arena, grant, "b", parent=key("a"))
    assert (result.status, result.location) == (CommitStatus.NO_PARENT, None)
    assert store.num_free == 8
    owned.close()


def test_one_message_commits_a_chain(tmp_path):
    owned, store, _ = new_store(tmp_path)
    granted = store.grant(1, 3)
    for grant, name in zip(granted, "abc", strict=True):
        fill(owned.arena, grant.slot, key(name))
    parents = [None, key("a"), key("b")]
    entries = [
        Entry(grant.slot, grant.epoch, key(name), parent, 16)
        for grant, name, parent in zip(granted, "abc", parents, strict=True)
    ]
    assert {result.status for result in store.commit(1, entries)} == {CommitStatus.COMMITTED}
    store.check()
    owned.close()


def test_a_page_that_a_rank_has_not_written_is_no_page(tmp_path):
    owned, store, _ = new_store(tmp_path, num_ranks=2)
    (grant,) = store.grant(1, 1)
    owned.arena.set_checksum(grant.slot, 0, 7)
    result = commit(store, owned.arena, grant, "a", written=False)
    assert (result.status, result.location) == (CommitStatus.INCOMPLETE, None)
    assert store.num_free == 8
    owned.close()


def test_checksums_of_a_slots_former_page_do_not_vouch_for_the_next(tmp_path):
    owned, store, _ = new_store(tmp_path, num_slots=1)
    store_chain(store, owned.arena, ["a"])
    (grant,) = store.grant(1, 1)
    assert commit(store, owned.arena, grant, "b", written=False).status is CommitStatus.INCOMPLETE
    owned.close()


def test_a_dead_groups_grants_are_free_again(tmp_path):
    owned, store, _ = new_store(tmp_path)
    store_chain(store, owned.arena, "ab")
    store.grant(1, 3)
    others = store.grant(2, 2)
    assert store.reclaim(1) == 3
    store.check()
    assert (store.num_writing, store.num_ready) == (2, 2)
    assert commit(store, owned.arena, others[0], "c", group=2).status is CommitStatus.COMMITTED
    owned.close()


def test_a_tenant_at_its_quota_replaces_its_own_oldest_pages(tmp_path):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(tenant_ratio=0.5))
    store_chain(store, owned.arena, ["other"], tenant=9)
    for name in "abcd":
        store_chain(store, owned.arena, [name], tenant=5)
    store.touch([key("a")])
    store_chain(store, owned.arena, ["e"], tenant=5)
    found = store.lookup([key(name) for name in ["other", *"abcde"]])
    assert [location is not None for location in found] == [True, True, False, True, True, True]
    assert (store.num_pages_of(5), store.num_pages_of(9), store.num_free) == (4, 1, 3)
    store.check()
    owned.close()


def test_a_chain_longer_than_the_quota_stops_there_and_keeps_its_beginning(tmp_path):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(tenant_ratio=0.5))
    keys = store_chain(store, owned.arena, "abcd", tenant=5)
    (grant,) = store.grant(1, 1)
    result = commit(store, owned.arena, grant, "e", parent=keys[-1], tenant=5)
    assert result.status is CommitStatus.OVER_QUOTA
    assert None not in store.lookup(keys)
    assert store.num_free == 4
    owned.close()


def test_pins_hold_a_page_and_its_prefix_within_the_budget(tmp_path):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(pinned_ratio=0.5))
    keys = store_chain(store, owned.arena, "abc")
    others = store_chain(store, owned.arena, "xyz")
    assert store.pin(keys[1]) and store.pin(keys[1]) and not store.pin(key("nowhere"))
    assert store.num_pinned == 2
    with pytest.raises(
        PinBudgetError, match="2 pages are pinned and this pin needs 3 more, over the budget of 4"
    ):
        store.pin(others[2])
    store.check()
    store.grant(1, 8)
    store.check()
    assert [location is not None for location in store.lookup(keys)] == [True, True, False]
    assert store.unpin(keys[1])
    assert store.num_pinned == 2, "pinned twice"
    assert store.unpin(keys[1]) and not store.unpin(keys[1]) and not store.unpin(key("nowhere"))
    assert len(store.grant(1, 8)) == 2
    owned.close()


def test_a_corrupt_page_goes_with_all_that_continue_it(tmp_path):
    owned, store, changes = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abcd")
    beside = store_chain(store, owned.arena, "x", parent=keys[0])
    (location,) = store.lookup([keys[1]])
    store.pin(keys[3])
    assert store.drop(Location(location.slot, location.epoch + 2), "corrupt") == 0
    assert store.drop(Location(99, 2), "corrupt") == store.drop(Location(-1, 2), "corrupt") == 0
    del changes[:]
    assert store.drop(location, "corrupt") == 3
    store.check()
    assert [change.key for change in changes] == [keys[3], keys[2], keys[1]]
    assert all(isinstance(change, Removed) for change in changes)
    assert store.lookup(keys + beside)[1:4] == [None] * 3
    assert None not in store.lookup([keys[0], *beside])
    assert (store.num_dropped["corrupt"], store.num_pinned, store.num_free) == (3, 0, 6)
    assert store.drop(location, "corrupt") == 0
    owned.close()


def test_clear_removes_every_page_and_leaves_grants(tmp_path):
    owned, store, _ = new_store(tmp_path)
    keys = store_chain(store, owned.arena, "abc")
    store.pin(keys[0])
    (grant,) = store.grant(1, 1)
    assert store.clear() == 3
    store.check()
    assert (store.num_ready, store.num_free, store.num_pinned) == (0, 7, 0)
    assert commit(store, owned.arena, grant, "d").status is CommitStatus.COMMITTED
    assert store.clear() == 1 and store.clear() == 0
    owned.close()


def test_the_changes_tell_exactly_what_is_stored(tmp_path):
    owned, store, changes = new_store(tmp_path, num_slots=6)
    for chain in ("abc", "xyz", "pq", "mn"):
        store_chain(store, owned.arena, chain)
        store.check()
    told = {}
    for change in changes:
        if isinstance(change, Stored):
            assert change.parent is None or change.parent in told
            told[change.key] = change
        else:
            assert (told[change.key].slot, told[change.key].epoch) == (change.slot, change.epoch)
            assert all(other.parent != change.key for other in told.values()), "children first"
            del told[change.key]
    assert sorted(told.values(), key=repr) == sorted(store.stored(), key=repr)
    assert store.num_evicted == 4
    owned.close()


@pytest.mark.parametrize(
    "options",
    [
        {"min_free_ratio": 0.2, "target_free_ratio": 0.1},
        {"target_free_ratio": 1.0},
        {"tenant_ratio": 0.0},
        {"pinned_ratio": 1.0},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="ratio"):
        PageStoreOptions(**options)


@pytest.mark.parametrize(
    "fields",
    [
        (-1, 1, key("a"), None, 1),
        (1, 1, b"short", None, 1),
        (1, 1, key("a"), b"", 1),
        (1, 1, key("a"), None, 1, -1),
    ],
)
def test_entries_that_cannot_be_do_not_decode(fields):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Entry)
