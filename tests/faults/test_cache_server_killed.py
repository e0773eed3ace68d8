"""A CacheServer or its clients are killed, stopped or gone: pages survive, nothing leaks, nobody waits."""

import multiprocessing
import os
import time

import pytest

from cache_service import messages
from cache_service.client import Deadlines
from cache_service.page_records import Entry
from tests.unit.arenas import key
from tests.unit.cache_nodes import (
    NUM_SLOTS,
    SOON,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    is_intact,
    new_client,
    serving,
    store_chain,
    write,
)

PATIENT = Deadlines(commit_s=30.0)
"""For servers that are started again: a process takes seconds where the cores are busy."""
SLACK_S = 1.0
"""Two busy cores may hold any thread up for so long."""


@pytest.fixture
def server(tmp_path):
    servers = [ServerProcess(tmp_path)]
    yield servers
    servers[-1].kill()


def restart(server, folder):
    server[-1].kill()
    server.append(ServerProcess(folder, **server[-1].ports))


def counts(server):
    return {(count.name, count.reason): count.value for count in server[-1].ask(messages.Stats()).counts}


def test_after_a_kill_pages_are_there_and_the_client_goes_on(server, tmp_path):
    client = new_client(server[-1].endpoint, deadlines=PATIENT)
    keys, locations = store_chain(client, range(20))
    entry = write(client, key("late"), keys[-1])
    open_slot = eventually(client.take_grant)
    assert client.acquire(keys[:1], locations[:1]) == 1
    server[-1].kill()
    assert client.acquire(keys, locations) == 20, "a dead server is not needed to read"
    client.commit([entry])
    server.append(ServerProcess(tmp_path, **server[-1].ports))
    eventually(lambda: client.stats.num_attaches == 2)
    eventually(lambda: client.locate(key("late")))
    assert client.take_lost() == []
    assert counts(server)["recovered", ""] == 20
    assert [client.locate(page_key) for page_key in keys] == locations
    for page_key, location in zip(keys, locations, strict=True):
        assert is_intact(client, page_key, location)
    assert server[-1].ask(messages.Check()) == messages.Done(21)
    # Its grants are its own still; a slot it has leased for the whole while is not given away.
    client.commit([write(client, key("new"))])
    eventually(lambda: client.locate(key("new")))
    for name in range(1000, 1060):
        store_chain(client, [name])
    assert is_intact(client, keys[0], locations[0])
    client.release([locations[0].slot, *(location.slot for location in locations)])
    client.abort([open_slot])
    eventually(lambda: server[-1].ask(messages.Stats()).num_writing == client.num_grants)
    server[-1].ask(messages.Check())
    client.close()
    stats = server[-1].ask(messages.Stats())
    assert (stats.num_writing, stats.num_draining, stats.num_readers) == (0, 0, 0)


def test_a_client_of_a_killed_server_reads_the_index_of_its_heir(server, tmp_path):
    client = new_client(server[-1].endpoint)
    keys, _ = store_chain(client, "abc")
    version = client.subscriber.follower.applied
    restart(server, tmp_path)
    eventually(lambda: client.subscriber.follower.applied.incarnation > version.incarnation)
    assert client.subscriber.follower.applied.incarnation == client.arena.incarnation
    server[-1].ask(messages.Clear())
    lost = []
    eventually(lambda: lost.extend(client.take_lost()) or len(lost) == 3)
    assert sorted(lost) == sorted(keys) and client.locate(keys[0]) is None
    client.close()


def hold(endpoint, told, leased):
    """A worker that has grants and leases, and never lets go."""
    client = new_client(endpoint, group=os.getpid())
    keys, locations = store_chain(client, ["mine", "too"])
    assert client.acquire(keys, locations) == 2
    grants = [eventually(client.take_grant) for _ in range(5)]
    told.put(len(grants))
    leased.wait()
    time.sleep(600)


def test_what_a_killed_worker_held_is_taken_back(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with serving(tmp_path) as server:
        me = new_client(server.core.endpoint)
        told, leased = spawn.Queue(), spawn.Event()
        worker = spawn.Process(target=hold, args=(server.core.endpoint, told, leased), daemon=True)
        worker.start()
        told.get(timeout=60)
        leased.set()
        stats = server.ask(messages.Stats())
        assert stats.num_readers == 2 and stats.num_writing > 8
        server.ask(messages.Clear())
        assert server.ask(messages.Stats()).num_draining == 2, "its reads may be under way"
        worker.kill()
        worker.join()
        eventually(lambda: server.ask(messages.Stats()).num_readers == 1)
        stats = eventually(lambda: (found := server.ask(messages.Stats())).num_draining == 0 and found)
        assert stats.num_writing == me.num_grants == 8
        assert stats.num_free == NUM_SLOTS - 8
        server.ask(messages.Check())
        me.close()


def test_a_worker_killed_while_no_server_lived_is_noticed_by_the_next(server, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    told, leased = spawn.Queue(), spawn.Event()
    worker = spawn.Process(target=hold, args=(server[-1].endpoint, told, leased), daemon=True)
    worker.start()
    told.get(timeout=60)
    server[-1].kill()
    worker.kill()
    worker.join()
    server.append(ServerProcess(tmp_path, **server[-1].ports))
    stats = server[-1].ask(messages.Stats())
    assert (stats.num_ready, stats.num_writing, stats.num_readers, stats.num_leased) == (2, 0, 0, 0)
    server[-1].ask(messages.Check())


def test_a_stopped_server_costs_nobody_more_than_a_deadline(server):
    client = new_client(server[-1].endpoint)
    keys, locations = store_chain(client, "ab")
    entries = [write(client, key(name), keys[-1]) for name in "cd"]
    server[-1].pause()
    ended = []
    for entry in entries:
        begun_s = time.monotonic()
        client.commit([entry])
        assert time.monotonic() - begun_s < SLACK_S / 4
    begun_s = time.monotonic()
    eventually(lambda: ended.extend(client.take_lost()) or len(ended) == 2)
    assert time.monotonic() - begun_s < SOON.commit_s + SLACK_S
    assert client.stats.commits["timeout"] + client.stats.commits["breaker_open"] == 2
    assert client.acquire(keys, locations) == 2
    client.release([location.slot for location in locations])
    eventually(lambda: client.take_grant() is None)
    server[-1].resume()
    eventually(lambda: client.connection.breaker.state == "closed")
    store_chain(client, "ef", keys[-1])
    server[-1].ask(messages.Check())
    # What it was told before it was stopped, it has done when it wakes; what it gave us, it counts as ours.
    client.close()
    eventually(lambda: server[-1].ask(messages.Stats()).num_writing == 0)


def test_with_the_server_gone_every_call_is_a_counted_miss_within_its_deadline(server):
    client = new_client(server[-1].endpoint)
    keys, locations = store_chain(client, "a")
    entry = write(client, key("b"), keys[0])
    server[-1].kill()
    eventually(lambda: not client.connection.is_attached)
    begun_s = time.monotonic()
    client.commit([entry])
    client.touch(keys)
    client.report_corrupt(locations[0])
    eventually(lambda: client.take_lost() == [key("b")])
    assert time.monotonic() - begun_s < SOON.commit_s + SLACK_S
    calls = client.connection.calls
    assert client.stats.commits["timeout"] + client.stats.commits["breaker_open"] == 1
    for kind in ("touch", "reportcorrupt"):
        assert calls[kind, "timeout"] + calls[kind, "breaker_open"] == 1
    assert client.connection.breaker.state != "closed"
    for _ in range(100):
        begun_s = time.monotonic()
        client.commit([Entry(entry.slot, entry.epoch, key("b"), None, 16)])
        assert client.take_grant() is None
        assert client.acquire(keys, locations) == 1
        client.release([locations[0].slot])
        assert time.monotonic() - begun_s < SLACK_S
    eventually(lambda: sum(client.stats.commits.values()) == 102)
    assert client.stats.misses["no_server"] == 100
    begun_s = time.monotonic()
    client.close()
    assert time.monotonic() - begun_s < TIMEOUT_S / 2


def test_kills_in_a_row_while_pages_are_written(server, tmp_path):
    client = new_client(server[-1].endpoint, deadlines=PATIENT)
    stored = []
    for round_ in range(3):
        keys, _ = store_chain(client, [f"{round_}-{number}" for number in range(4)])
        stored += keys
        last = write(client, key(f"{round_} last"), keys[-1])
        client.commit([last])
        restart(server, tmp_path)
        eventually(lambda round_=round_: client.stats.num_attaches == round_ + 2)
        # It was told before the kill or after: either way it is there.
        eventually(lambda last=last: client.locate(last.key))
        stored.append(last.key)
    assert client.take_lost() == []
    for page_key in stored:
        location = eventually(lambda page_key=page_key: client.locate(page_key))
        assert client.acquire([page_key], [location]) == 1
        assert is_intact(client, page_key, location)
        client.release([location.slot])
    eventually(lambda: server[-1].ask(messages.Stats()).num_writing == client.num_grants)
    server[-1].ask(messages.Check())
    client.close()
