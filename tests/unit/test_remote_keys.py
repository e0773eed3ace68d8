"""What a node knows of its remote store, and what it tells of it."""

from cache_service.relocation import Snapshot, Version
from cache_service.relocation_records import AllRemovedRemotely, RemovedRemotely, StoredRemotely
from cache_service.remote_keys import RemoteKeys
from tests.unit.arenas import key
from tests.unit.relocation_index import RelocationIndex


def test_a_page_is_told_once_and_its_loss_every_time():
    changes = []
    keys = RemoteKeys(10, changes)
    keys.add(key(1))
    keys.add(key(1))
    keys.lose(key(1))
    keys.lose(key(1))
    assert changes == [StoredRemotely(key(1)), RemovedRemotely(key(1)), RemovedRemotely(key(1))]
    assert key(1) not in keys


def test_the_longest_known_make_room_and_listeners_know_the_same():
    changes, listener = [], RelocationIndex()
    keys = RemoteKeys(3, changes)
    for name in (1, 2, 3):
        keys.add(key(name))
    keys.add(key(1))  # there still: 2 is the oldest now
    keys.add(key(4))
    assert [key(name) in keys for name in (1, 2, 3, 4)] == [True, False, True, True]
    listener.apply(changes)
    assert [listener.is_remote(key(name)) for name in (1, 2, 3, 4)] == [True, False, True, True]
    later = RelocationIndex()
    later.restart(Snapshot(Version(1, 1), [], b"".join(keys)).standing())
    assert [later.is_remote(key(name)) for name in (1, 2, 3, 4)] == [True, False, True, True]


def test_that_a_detached_store_has_none_of_them_is_told_at_once_however_many_there_were():
    changes, listener = [], RelocationIndex()
    keys = RemoteKeys(3, changes)
    for name in range(5):
        keys.add(key(name))
    num_told = len(changes)
    assert keys.lose_all() == 3
    assert changes[num_told:] == [AllRemovedRemotely()]
    assert keys.lose_all() == 0 and len(changes) == num_told + 1
    listener.apply(changes)
    assert not any(listener.is_remote(key(name)) for name in range(5))
    assert len(keys) == 0 and list(keys) == []
