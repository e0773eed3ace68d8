"""CacheClient against a server in a thread: pages, grants, losses; nothing blocks."""

import subprocess
import sys
import threading
import time

import pytest

from cache_service import arena_format, messages
from cache_service.client import CacheAttachError, CacheSilentError, group_of
from cache_service.config import CacheConfig
from cache_service.page_records import Entry, Location
from cache_service.processes import ProcessId
from tests.unit.arenas import key
from tests.unit.cache_nodes import (
    CONFIG,
    NUM_SLOTS,
    SOON,
    TIMEOUT_S,
    ServerThread,
    eventually,
    is_intact,
    new_client,
    serving,
    store_chain,
    write,
)
from tests.unit.raw_cache_client import RawClient, commit_chain

AT_ONCE_S = 0.05
"""More than any call may take of its caller's time, scheduling included."""


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def sleeper():
    popen = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield popen
    popen.kill()
    popen.wait()


@pytest.fixture
def client(server):
    client = new_client(server.core.endpoint)
    yield client
    client.close()


def timed(function, *arguments):
    begun_s = time.monotonic()
    result = function(*arguments)
    assert time.monotonic() - begun_s < AT_ONCE_S, f"{function.__name__} blocked its caller"
    return result


def num_writing(server):
    return server.ask(messages.Stats()).num_writing


def test_pages_are_written_committed_leased_and_read(server, client):
    keys, locations = store_chain(client, "abc")
    assert client.acquire(keys, locations) == 3
    assert all(is_intact(client, *pair) for pair in zip(keys, locations, strict=True))
    assert client.leases.num_leased == 3
    client.release([location.slot for location in locations])
    assert client.leases.num_leased == 0
    assert client.stats.num_hits == 3 and client.stats.commits == {"committed": 3}
    assert client.locate(key("x")) is None
    assert server.ask(messages.Check()) == messages.Done(3)


def test_nothing_that_the_step_loop_calls_blocks(server, client):
    keys, locations = store_chain(client, "ab")
    entry = write(client, key("c"), keys[-1])
    grant = eventually(client.take_grant)
    stuck, go_on = threading.Event(), threading.Event()
    server.before_turn = lambda: stuck.set() or go_on.wait(TIMEOUT_S)
    assert stuck.wait(TIMEOUT_S)
    timed(client.locate, keys[0])
    assert timed(client.acquire, keys, locations) == 2
    timed(client.release, [location.slot for location in locations])
    timed(client.commit, [entry])
    timed(client.abort, [grant])
    timed(client.touch, keys)
    timed(client.report_corrupt, locations[1])
    timed(client.take_grant)
    timed(client.take_lost)
    server.before_turn = None
    go_on.set()
    eventually(lambda: client.take_lost() == [keys[1], key("c")] or client.locate(keys[1]) is None)


def test_acquire_ends_at_the_first_page_that_is_not_as_told(server, client):
    keys, locations = store_chain(client, "abcd")
    wrong = [*locations[:2], Location(locations[2].slot, locations[2].epoch + 2), locations[3]]
    assert client.acquire(keys, wrong) == 2
    assert client.leases.num_leased == 2
    assert client.stats.misses["stale"] == 2
    client.release([location.slot for location in locations[:2]])


def test_grants_are_held_in_advance_and_refilled(server, client):
    eventually(lambda: client.num_grants == 8)
    grants = [timed(client.take_grant) for _ in range(8)]
    assert None not in grants and len({grant.slot for grant in grants}) == 8
    eventually(lambda: client.num_grants == 8)
    assert num_writing(server) == 16
    client.abort(grants)
    eventually(lambda: num_writing(server) == 8)


def test_the_replicas_of_a_node_hold_an_eighth_of_it_among_them(server, sleeper):
    client = new_client(server.core.endpoint, num_grants=NUM_SLOTS)
    eventually(lambda: client.num_grants == NUM_SLOTS // 8)
    with RawClient(server, ProcessId.of(sleeper.pid)) as other:
        assert other.attach(group=8).max_grants == NUM_SLOTS // 16
        client.abort([client.take_grant() for _ in range(NUM_SLOTS // 8)])
        eventually(lambda: num_writing(server) == client.num_grants == NUM_SLOTS // 16)
    client.close()


def test_without_a_free_slot_there_is_no_grant_until_there_is_one(server, client):
    taken = []

    def take_all():
        while (grant := client.take_grant()) is not None:
            taken.append(grant)
        return num_writing(server) == NUM_SLOTS and client.num_grants == 0

    eventually(take_all)
    assert client.take_grant() is None and client.stats.misses["no_grant"] >= 1
    client.abort(taken)
    eventually(client.take_grant)


def test_pages_that_are_not_taken_in_are_told(server, client):
    keys, _ = store_chain(client, "a")
    orphan = write(client, key("child"), key("nobody's"))
    twice = write(client, keys[0])
    incomplete = write(client, key("half"))
    client.arena.set_checksum(incomplete.slot, 0, 0)
    stale = Entry(incomplete.slot, incomplete.epoch + 2, key("stale"), None, 16)
    client.commit([orphan, twice, stale, incomplete])
    lost = []
    eventually(lambda: lost.extend(client.take_lost()) or len(lost) == 3)
    assert lost == [key("child"), key("stale"), key("half")], "a page that is there already is not lost"
    assert client.stats.commits == {
        "committed": 1, "no_parent": 1, "duplicate": 1, "stale": 1, "incomplete": 1,
    }  # fmt: skip
    assert client.take_lost() == []
    server.ask(messages.Check())


def test_pages_that_others_store_and_that_go_are_heard_of(server, client, tmp_path):
    with RawClient(server, ProcessId(1, ProcessId.of(1).start_ticks)) as other:
        other.attach(group=99)
        (first, second) = [result.location for result in commit_chain(server, other, "ab")]
        eventually(lambda: client.locate(key("b")) == second)
        assert client.acquire([key("a"), key("b")], [first, second]) == 2
        client.release([first.slot, second.slot])
        client.report_corrupt(second)
        eventually(lambda: client.locate(key("b")) is None)
        assert client.take_lost() == [key("b")]
        other.ask(messages.Clear())
        eventually(lambda: client.locate(key("a")) is None)
        assert client.take_lost() == [key("a")]


def test_a_page_that_goes_and_comes_back_is_not_lost(server, client):
    keys, _ = store_chain(client, "a")
    server.ask(messages.Clear())
    eventually(lambda: client.locate(keys[0]) is None)
    store_chain(client, "a")
    assert client.take_lost() == []


def test_touched_pages_outlive_others(server, client):
    keys, _ = store_chain(client, "a")
    for _ in range(3):
        client.touch(keys)
    for start in range(0, 120, 4):
        store_chain(client, range(start, start + 4))
    assert client.locate(keys[0]) is not None


def test_all_ranks_of_a_group_write_one_page(tmp_path):
    with serving(tmp_path) as server:
        leader = new_client(server.core.endpoint, num_ranks=2)
        entry = write(leader, key("a"))
        leader.arena.set_checksum(entry.slot, 1, 0)
        leader.commit([entry])
        eventually(lambda: leader.stats.commits["incomplete"] == 1)
        assert leader.take_lost() == [key("a")]
        keys, locations = store_chain(leader, "a")
        assert leader.acquire(keys, locations) == 1 and is_intact(leader, keys[0], locations[0])
        leader.release([locations[0].slot])
        leader.close()


def test_a_follower_holds_no_grants_and_follows_nobody(server):
    client = new_client(server.core.endpoint, is_decider=False)
    time.sleep(0.2)
    assert client.num_grants == 0 and client.take_grant() is None and client.subscriber is None
    assert num_writing(server) == 0
    client.close()
    assert server.ask(messages.Stats()).num_readers == 0


def test_who_leaves_gives_back_all_and_who_still_reads_keeps_it(server):
    client = new_client(server.core.endpoint)
    keys, locations = store_chain(client, "a")
    client.close()
    stats = server.ask(messages.Stats())
    assert (stats.num_writing, stats.num_readers, stats.num_ready) == (0, 0, 1)
    reader = new_client(server.core.endpoint)
    eventually(lambda: reader.locate(keys[0]))
    assert reader.acquire(keys, locations) == 1
    reader.close()
    assert server.ask(messages.Stats()).num_readers == 1, "a copy may be under way: only its death ends it"


def test_a_refused_worker_is_told_why(server, client):
    for changes, text in (
        ({"fingerprint": b"of another model"}, "one node's workers serve one model in one layout"),
        ({"num_ranks": 9}, "9 x 4096 bytes"),
    ):
        other = new_client(server.core.endpoint, start=False, **changes)
        with pytest.raises(CacheAttachError, match=text):
            other.start(TIMEOUT_S)
        other.close()


def test_a_server_that_is_not_there_is_named_in_time():
    client = new_client("tcp://127.0.0.1:1", start=False)
    begun_s = time.monotonic()
    with pytest.raises(CacheAttachError, match=r"at tcp://127\.0\.0\.1:1 did not answer within 0\.5 s"):
        client.start(0.5)
    assert time.monotonic() - begun_s < 1.0
    client.close()


def test_a_server_that_comes_late_is_attached_to_all_the_same(tmp_path):
    with serving(tmp_path) as former:
        ports = former.ports
    client = new_client(former.core.endpoint, start=False)
    with pytest.raises(CacheSilentError):
        client.start(0.2)
    assert not client.is_mapped and client.locate(key("a")) is None and client.take_grant() is None
    with serving(tmp_path, **ports):
        eventually(lambda: client.is_mapped)
        ((page_key,), (location,)) = store_chain(client, "a")
        assert is_intact(client, page_key, location)
        client.close()


def test_an_arena_that_is_not_the_servers_is_not_used(server, tmp_path):
    """As where worker and server run in containers that each have a /dev/shm of their own."""
    with RawClient(server) as raw:
        raw.attach()
    path, aside = server.core._arena.arena.path, tmp_path / "aside"
    others = bytearray(path.read_bytes())
    others[8 * arena_format.INCARNATION_WORD : 8 * arena_format.INCARNATION_WORD + 8] = bytes(8)
    path.rename(aside)
    path.write_bytes(others)
    client = new_client(server.core.endpoint, start=False)
    with pytest.raises(CacheAttachError, match="have to share /dev/shm"):
        client.start(TIMEOUT_S)
    client.close()
    aside.rename(path)


def test_grants_that_came_too_late_are_held_all_the_same(server):
    client = new_client(server.core.endpoint)
    eventually(lambda: client.num_grants == 8)
    server.before_turn = lambda: time.sleep(0.5)
    taken = [client.take_grant() for _ in range(6)]
    eventually(lambda: client.connection.calls["grantslots", "timeout"] >= 1)
    server.before_turn = None
    eventually(lambda: client.connection.breaker.state == "closed" and client.num_grants >= 6)
    client.abort(taken)
    eventually(lambda: num_writing(server) == client.num_grants)
    client.close()
    assert num_writing(server) == 0


def test_grants_whose_answer_was_lost_are_told_again_with_the_attach(tmp_path):
    server = ServerThread(tmp_path, CacheConfig(host_cache_gb=CONFIG.host_cache_gb, keep_arena=True))
    reply = server.core._reply
    server.core._reply = lambda identity, call_id, answer: (
        isinstance(answer, messages.Granted) or reply(identity, call_id, answer)
    )
    client = new_client(server.core.endpoint)
    eventually(lambda: num_writing(server) >= 8)
    assert client.take_grant() is None
    server.stop()
    with serving(tmp_path, **server.ports) as heir:
        grants = [eventually(client.take_grant) for _ in range(8)]
        assert len({grant.slot for grant in grants}) == 8
        client.abort(grants)
        eventually(lambda: client.num_grants >= 8 and num_writing(heir) == client.num_grants)
        client.close()
        assert num_writing(heir) == 0


def test_a_slow_server_opens_the_breaker_and_closes_it_when_it_answers(server, client):
    keys, locations = store_chain(client, "a")
    entry = write(client, key("b"), keys[0])
    slow, go_on = threading.Event(), threading.Event()
    server.before_turn = lambda: slow.set() or go_on.wait(TIMEOUT_S)
    assert slow.wait(TIMEOUT_S)
    for _ in range(2):
        client.touch(keys)
    eventually(lambda: client.connection.breaker.state != "closed")
    assert client.take_grant() is None and client.stats.misses["no_server"] == 1
    assert client.acquire(keys, locations) == 1, "what is here can be read all the same"
    client.release([locations[0].slot])
    begun_s = time.monotonic()
    client.commit([entry])
    eventually(lambda: client.take_lost() == [key("b")])
    assert time.monotonic() - begun_s < SOON.commit_s, "nobody waits for a server that does not answer"
    assert client.stats.commits["breaker_open"] + client.stats.commits["timeout"] == 1
    server.before_turn = None
    go_on.set()
    eventually(lambda: client.connection.breaker.state == "closed")
    store_chain(client, "b", keys[0])
    eventually(lambda: num_writing(server) == client.num_grants)  # the lost page's slot is given back
    assert client.connection.breaker.num_opened == 1


def test_a_restarted_server_takes_the_process_back_and_pages_still_hit(tmp_path):
    server = ServerThread(tmp_path, CacheConfig(host_cache_gb=CONFIG.host_cache_gb, keep_arena=True))
    client = new_client(server.core.endpoint)
    keys, locations = store_chain(client, "ab")
    entry = write(client, key("c"), keys[-1])
    incarnation = client.arena.incarnation
    server.stop()
    eventually(lambda: not client.connection.is_attached)
    assert client.acquire(keys, locations) == 2, "pages are read without any server"
    client.release([location.slot for location in locations])
    client.commit([entry])
    with serving(tmp_path, **server.ports) as heir:
        eventually(lambda: client.stats.num_attaches == 2)
        eventually(lambda: client.stats.commits["committed"] == 3)  # the entry was told again
        eventually(lambda: client.locate(key("c")))
        assert client.arena.incarnation > incarnation
        assert heir.ask(messages.Lookup([*keys, key("c")])).locations[:2] == locations
        assert client.take_lost() == []
        store_chain(client, "d", key("c"))
        eventually(lambda: num_writing(heir) == client.num_grants)
        heir.ask(messages.Check())
        client.close()


def test_a_server_with_a_new_arena_is_of_no_use_to_who_mapped_the_old(tmp_path):
    server = ServerThread(tmp_path)
    client = new_client(server.core.endpoint)
    keys, locations = store_chain(client, "ab")
    server.stop()
    with serving(tmp_path, **server.ports):
        eventually(lambda: client.stats.num_attaches == 2)
        assert client.locate(keys[0]) is None
        assert client.acquire(keys, locations) == 0 and client.stats.misses["replaced"] == 2
        assert client.take_grant() is None
        client.close()


def test_group_numbers_fit_an_attach():
    assert group_of(0) == 1 and group_of(2**62) <= (1 << 32) - 1 and group_of((1 << 32) - 2) == (1 << 32) - 1
