"""A CacheServer with a store: what workers commit outlives the arena, and what is not right is a miss."""

import os
import signal

import pytest

from cache_service.config import CacheConfig
from cache_service.messages import AttachStore, ChangesSince, Clear, DetachStore, Done, FetchStatus, Stats
from cache_service.one_call import CallError
from cache_service.relocation_records import StoredRemotely
from cache_service.remote import RECORD_FORMAT_VERSION, RecordLayout
from tests.unit.arenas import FINGERPRINT, key
from tests.unit.cache_nodes import (
    BUNDLE_BYTES,
    CONFIG,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    is_intact,
    new_client,
    serving,
    store_chain,
)
from tests.unit.fake_store import ADDRESS, FakeOpener
from tests.unit.mooncake_master import free_port
from tests.unit.test_fetch_calls import take_all, wanted

LAYOUT = RecordLayout(FINGERPRINT, BUNDLE_BYTES, 1)
FETCHED, MISSING, CORRUPT, FAILED = (
    FetchStatus.FETCHED,
    FetchStatus.MISSING,
    FetchStatus.CORRUPT,
    FetchStatus.FAILED,
)


def config(store):
    return CacheConfig(host_cache_gb=CONFIG.host_cache_gb, store=store)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def disk(tmp_path, folder):
    """A server whose configuration names a disk store."""
    with serving(tmp_path, config(f"disk:{folder}?gb=0.1")) as server:
        yield server


@pytest.fixture
def client(disk):
    client = new_client(disk.core.endpoint)
    yield client
    client.close()


def counters(server):
    return {(count.name, count.reason): count.value for count in server.ask(Stats()).counts}


def is_known(server, num_pages):
    return lambda: server.ask(Stats()).num_known_remote == num_pages


def fetch(client, *names, parent=None):
    """Fetch pages that continue each other from the store; return statuses."""
    client.fetch(wanted(*names, parent=parent), None, TIMEOUT_S)
    (answer,) = take_all(client)
    assert not isinstance(answer.outcome, tuple), answer.outcome
    for name, result in zip(names, answer.outcome, strict=True):
        if result.location is not None:
            assert client.acquire([key(name)], [result.location]) == 1
            assert is_intact(client, key(name), result.location)
            client.release([result.location.slot])
    return [result.status for result in answer.outcome]


def record(folder, name):
    return folder / f"{LAYOUT.name(key(name))}.page"


def test_pages_come_back_from_the_store_once_they_have_left_the_arena(disk, client):
    keys, _ = store_chain(client, "abcd")
    eventually(is_known(disk, 4))
    eventually(lambda: all(map(client.is_remote, keys)))
    assert disk.ask(Clear()).count == 4
    assert fetch(client, *"abcd", "e") == [FETCHED] * 4 + [MISSING]
    # They came from there: nobody puts them again.
    store_chain(client, "x", parent=key("d"))
    eventually(is_known(disk, 5))
    found = counters(disk)
    assert found["puts", "stored"] == 5 and ("puts", "present") not in found
    assert (found["gets", "found"], found["gets", "missing"]) == (4, 1)


def test_a_snapshot_and_the_figures_say_what_the_store_has(disk, client, folder):
    keys, _ = store_chain(client, "ab")
    eventually(is_known(disk, 2))
    snapshot = disk.ask(ChangesSince(None))
    remote = [entry.key for entry in snapshot.standing() if isinstance(entry, StoredRemotely)]
    assert remote == keys and len(snapshot.stored) == 2
    assert snapshot.remote == b"".join(keys), "few bytes a page: the server's thread writes them"
    stats = disk.ask(Stats())
    assert (stats.store, stats.num_put_waiting) == (f"disk:{folder}?gb=0.1", 0)


def test_a_page_on_disk_outlives_arena_and_server(tmp_path, folder):
    with serving(tmp_path, config(f"disk:{folder}?gb=0.1")) as server:
        client = new_client(server.core.endpoint)
        store_chain(client, "ab")
        eventually(is_known(server, 2))
        client.close()
    with serving(tmp_path, config(f"disk:{folder}?gb=0.1")) as server:
        client = new_client(server.core.endpoint)
        eventually(lambda: client.is_remote(key("a")) and client.is_remote(key("b")))
        assert fetch(client, "a", "b") == [FETCHED] * 2
        client.close()


def test_a_server_killed_while_it_puts_leaves_whole_pages(tmp_path, folder):
    server = ServerProcess(tmp_path, config(f"disk:{folder}?gb=0.1"))
    client = new_client(server.endpoint)
    store_chain(client, range(40))
    eventually(lambda: len(list(folder.glob("*.page"))) >= 3)
    server.kill()
    client.close()
    with serving(tmp_path, config(f"disk:{folder}?gb=0.1"), **server.ports) as heir:
        client = new_client(heir.core.endpoint)
        eventually(is_known(heir, 40))  # it found the arena's pages, and puts what is not there yet
        heir.ask(Clear())
        parent = None
        for start in range(0, 40, 8):
            assert fetch(client, *range(start, start + 8), parent=parent) == [FETCHED] * 8
            parent = key(start + 7)
        client.close()


def test_a_flipped_bit_on_disk_is_a_counted_miss_and_the_page_is_put_again(disk, client, folder):
    keys, _ = store_chain(client, "abc")
    eventually(is_known(disk, 3))
    disk.ask(Clear())
    data = bytearray(record(folder, "b").read_bytes())
    data[-1] ^= 1
    record(folder, "b").write_bytes(data)
    assert fetch(client, "a", "b", "c") == [FETCHED, CORRUPT, CORRUPT]
    eventually(lambda: not client.is_remote(keys[1]))
    assert counters(disk)["gets", "corrupt"] == 1
    assert not record(folder, "b").exists()
    store_chain(client, "b", parent=key("a"))
    eventually(is_known(disk, 3))
    disk.ask(Clear())
    assert fetch(client, "a", "b", "c") == [FETCHED] * 3


def test_a_record_of_a_future_format_is_a_counted_miss(disk, client, folder):
    store_chain(client, "a")
    eventually(is_known(disk, 1))
    disk.ask(Clear())
    data = bytearray(record(folder, "a").read_bytes())
    data[8:12] = (RECORD_FORMAT_VERSION + 1).to_bytes(4, "little")
    record(folder, "a").write_bytes(data)
    assert fetch(client, "a") == [MISSING]
    assert counters(disk)["gets", "foreign"] == 1


def test_a_disk_that_takes_no_bytes_costs_pages_only(disk, client, folder):
    """No file can be made where the folder's name is another's."""
    eventually(lambda: disk.ask(Stats()).store)
    folder.rename(folder.with_name("away"))
    folder.touch()
    store_chain(client, "ab")
    eventually(lambda: counters(disk).get(("puts", "failed")) == 2)
    assert counters(disk)["store_failures", "put: Not a directory"] == 2
    disk.ask(Clear())
    assert fetch(client, "a") == [FAILED]
    assert counters(disk)["store_failures", "get: Not a directory"] == 1
    store_chain(client, "cd")


@pytest.mark.parametrize("store", ["mooncake:127.0.0.1:{port}?segment_gb=0", "disk:{folder}?gb=0.1"])
def test_a_store_that_is_not_there_keeps_no_server_from_starting(tmp_path, folder, store):
    folder.touch()  # no folder
    store = store.format(port=free_port(), folder=folder)
    with serving(tmp_path, config(store)) as server:
        client = new_client(server.core.endpoint)
        eventually(lambda: counters(server).get(("stores", "failed")))
        store_chain(client, "ab")
        assert fetch(client, "x") == [FAILED]
        assert counters(server)["fetches_refused", "no_source"] == 1
        assert server.ask(Stats()).store == ""
        with pytest.raises(CallError, match=r"refused: (Mooncake cannot be loaded|no Mooncake|disk store)"):
            server.ask(AttachStore(store))
        client.close()


def test_a_store_is_attached_and_detached_while_pages_come_and_go(tmp_path, folder):
    with serving(tmp_path) as server:
        client = new_client(server.core.endpoint)
        store_chain(client, "ab")
        assert fetch(client, "x") == [FAILED]
        with pytest.raises(CallError, match="neither a disk nor Mooncake"):
            server.ask(AttachStore("s3:bucket"))
        assert server.ask(AttachStore(f"disk:{folder}?gb=0.1")) == Done()
        keys, _ = store_chain(client, "cd", parent=key("b"))
        eventually(is_known(server, 4))  # and what they continue
        server.ask(Clear())
        assert fetch(client, "a", "b") == [FETCHED] * 2
        assert server.ask(DetachStore()) == Done()
        eventually(lambda: not any(map(client.is_remote, keys)))
        assert fetch(client, "c", parent=key("b")) == [FAILED]
        assert server.ask(AttachStore(f"disk:{folder}?gb=0.1")) == Done()
        eventually(is_known(server, 4))
        assert fetch(client, "c", parent=key("b")) == [FETCHED]
        client.close()


def test_a_detach_answers_fetches_under_way(tmp_path):
    opener = FakeOpener()
    with serving(tmp_path, open_store=opener) as server:
        client = new_client(server.core.endpoint)
        server.ask(AttachStore(ADDRESS))
        store_chain(client, "a")
        eventually(is_known(server, 1))
        server.ask(Clear())
        opener.store.goes_on.clear()
        client.fetch(wanted("a"), None, TIMEOUT_S)
        assert opener.store.hanging.acquire(timeout=TIMEOUT_S)
        assert server.ask(DetachStore()) == Done()
        (answer,) = take_all(client)
        assert [result.status for result in answer.outcome] == [FAILED]
        stats = eventually(lambda: (stats := server.ask(Stats())).num_writing == client.num_grants and stats)
        assert stats.num_ready == 0
        client.close()


def test_a_store_that_hangs_holds_up_no_call_and_not_the_stop(tmp_path):
    opener = FakeOpener()
    with serving(tmp_path, open_store=opener) as server:
        client = new_client(server.core.endpoint)
        server.ask(AttachStore(ADDRESS))
        opener.store.goes_on.clear()
        keys, _ = store_chain(client, "a")
        assert opener.store.hanging.acquire(timeout=TIMEOUT_S)
        store_chain(client, "bcd", parent=keys[0])  # is there at once
        client.fetch(wanted("x"), None, 0.2)
        (answer,) = take_all(client)
        assert [result.status for result in answer.outcome] == [FetchStatus.TIMED_OUT]
        client.close()


def test_a_frozen_server_is_not_needed_to_read_what_it_has_put(tmp_path, folder):
    """The folder has one owner: while that lives, another server's is refused, and says so."""
    owner = ServerProcess(tmp_path, config(f"disk:{folder}?gb=0.1"))
    client = new_client(owner.endpoint)
    eventually(lambda: owner.ask(Stats()).store)
    os.kill(owner.process.pid, signal.SIGSTOP)
    (tmp_path / "other").mkdir()
    with serving(tmp_path / "other") as server:
        other = new_client(server.core.endpoint)
        with pytest.raises(CallError, match="in use by another process"):
            server.ask(AttachStore(f"disk:{folder}?gb=0.1"))
        other.close()
    owner.kill()
    client.close()
