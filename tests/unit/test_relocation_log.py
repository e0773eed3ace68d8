import msgspec
import pytest

from cache_service.keys import PageKey
from cache_service.page_replica import PageReplica
from cache_service.relocation import Changes, RelocationLog, Snapshot, Version
from cache_service.relocation_follower import RelocationFollower
from cache_service.relocation_records import Removed, Stored, StoredRemotely

KEY = PageKey(b"k" * 16)


def stored(slot: int) -> Stored:
    return Stored(KEY, None, slot, 2)


def test_each_change_raises_the_counter_by_one():
    log = RelocationLog(incarnation=5)
    assert log.version == Version(5, 0)
    log.append(stored(1))
    log.append(Removed(KEY, 1, 2))
    assert log.version == Version(5, 2)
    assert log.changes_since(Version(5, 1)) == Changes(5, 1, [Removed(KEY, 1, 2)])
    assert log.changes_since(Version(5, 2)) == Changes(5, 2, [])


@pytest.mark.parametrize("version", [None, Version(4, 1), Version(5, 3)])
def test_a_version_that_never_was_needs_a_snapshot(version):
    log = RelocationLog(incarnation=5)
    log.append(stored(1))
    assert log.changes_since(version) is None
    assert log.resync(version, [stored(1)]) == Snapshot(Version(5, 1), [stored(1)])
    assert log.resync(version, [], [KEY, KEY]).standing() == [StoredRemotely(KEY)] * 2


def test_log_is_bounded_and_goes_back_as_far_as_it_says():
    log = RelocationLog(incarnation=5, max_changes=10)
    for number in range(1_000):
        log.append(stored(number))
        for back in range(min(number + 1, 10) + 1):
            changes = log.changes_since(Version(5, number + 1 - back))
            assert changes is not None
            assert [change.slot for change in changes.changes] == list(range(number + 1 - back, number + 1))
            assert changes.counter == number + 1
    assert log.changes_since(Version(5, 1_000 - 21)) is None


def test_changes_and_snapshots_cross_the_wire():
    for record in (
        Changes(2**64 - 1, 7, [stored(1), Removed(KEY, 1, 2**40), Stored(KEY, KEY, 2, 4)]),
        Snapshot(Version(1, 2), [stored(3)]),
    ):
        encoded = msgspec.msgpack.encode(record)
        assert msgspec.msgpack.decode(encoded, type=Changes | Snapshot) == record


def test_a_snapshot_tells_what_was_lost_meanwhile():
    replica, kept = PageReplica(), PageKey(b"k" * 16)
    gone = PageKey(b"g" * 16)
    replica.apply([Stored(kept, None, 1, 2), Stored(gone, None, 2, 2)])
    replica.restart([Stored(kept, None, 3, 4), StoredRemotely(gone)])
    assert replica.take_lost() == [gone] and replica.take_lost() == []
    assert replica.get(gone) is None and replica.get(kept).slot == 3
    assert replica.is_remote(gone) and not replica.is_remote(kept)


def test_once_the_owner_has_spoken_what_a_dead_incarnation_said_asks_for_nothing_more():
    follower = RelocationFollower(PageReplica())
    follower.receive(Changes(4, 7, [stored(1)]), 0.0)
    ticket = follower.begin_resync()
    follower.receive(Changes(5, 1, [stored(2)]), 0.0)
    follower.resynced(Snapshot(Version(5, 1), []), ticket, 0.0)
    assert follower.applied == Version(5, 2) and not follower.needs_resync(1.0)
    follower.receive(Changes(4, 8, []), 1.0)
    assert follower.needs_resync(1.0), "it might be of a new one"
    follower.resynced(Changes(5, 2, []), follower.begin_resync(), 1.0)
    assert not follower.needs_resync(2.0)
