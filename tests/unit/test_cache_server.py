"""What a CacheServer answers and refuses, and what it takes back, over real sockets."""

import os
import re
import subprocess
import sys
import time

import msgspec
import pytest

from cache_service import messages
from cache_service.config import CacheConfig
from cache_service.messages import Call
from cache_service.one_call import CallError, call_once
from cache_service.page_records import CommitStatus, Location
from cache_service.processes import ProcessId
from cache_service.relocation import Changes, Snapshot, Version
from tests.unit.arenas import key
from tests.unit.cache_nodes import (
    CONFIG,
    NUM_SLOTS,
    SECRET,
    eventually,
    serving,
)
from tests.unit.raw_cache_client import RawClient, commit_chain


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


def test_pages_are_granted_committed_found_and_cleared(server):
    with RawClient(server) as raw:
        attached = raw.attach()
        assert attached.grants == [] and attached.broadcasts == server.core.broadcasts
        results = commit_chain(server, raw, "abc")
        assert [result.status for result in results] == [CommitStatus.COMMITTED] * 3
        found = raw.ask(messages.Lookup([key("a"), key("x"), key("c")])).locations
        assert found == [results[0].location, None, results[2].location]
        assert raw.ask(messages.Touch([key("a"), key("x")])) == messages.Done(2)
        assert raw.ask(messages.Check()) == messages.Done(3)
        assert raw.version.counter == 3, "every reply says how far the log is"
        assert raw.ask(messages.Clear()) == messages.Done(3)
        assert raw.ask(messages.Lookup([key("a")])).locations == [None]
        assert raw.version.counter == 6


def test_before_anybody_attaches_there_is_nothing(server):
    with RawClient(server) as raw:
        assert raw.ask(messages.Lookup([key("a")])).locations == [None]
        assert raw.ask(messages.ChangesSince(None)) == Snapshot(raw.version, [])
        assert raw.ask(messages.Stats()).num_slots == 0
        assert raw.ask(messages.Clear()) == messages.Done(0)
        wanted = [messages.WantedPage(key("a"), None, 16)]
        (result,) = raw.ask(messages.Fetch(wanted, None, 1.0)).results
        assert result == messages.FetchResult(messages.FetchStatus.FAILED, None)
        assert not list(server.core._arena._path.parent.glob("*.arena"))


@pytest.mark.parametrize(
    "request_", [messages.GrantSlots(1), messages.Commit([]), messages.Abort([]), messages.Detach()]
)
@pytest.mark.parametrize("has_arena", [False, True])
def test_who_has_not_attached_writes_nothing(server, request_, has_arena):
    with RawClient(server) as raw, RawClient(server) as other:
        if has_arena:
            other.attach()
        answer = raw.ask(request_)
        assert answer.code == "not_attached" and "attach first" in answer.reason


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"protocol_version": 99}, "protocol_version", "speaks protocol 99, this server 1; run the same"),
        ({"cluster_id": "another"}, "cluster", "of cluster another, this server of"),
        ({"fingerprint": b"x" * 16}, "layout", "one node's workers serve one model in one layout"),
        ({"bundle_bytes": 8192}, "layout", r"this worker's are of layout \w+ \(1 x 8192 bytes\)"),
        ({"num_ranks": 2}, "layout", "holds pages of .*1 x 4096 bytes.*2 x 4096 bytes"),
    ],
)
def test_a_worker_of_another_kind_is_refused_by_name(server, changes, code, text):
    with RawClient(server, ProcessId.of(os.getppid())) as first, RawClient(server) as raw:
        assert isinstance(first.attach(), messages.Attached)
        answer = raw.attach(**changes)
        assert isinstance(answer, messages.Refused) and answer.code == code
        assert re.search(text, answer.reason), answer.reason


def test_a_worker_that_the_server_cannot_see_is_refused(server, sleeper):
    """Its leases would count as a dead process's."""
    process = ProcessId.of(sleeper.pid)
    unseen = ProcessId(process.pid, process.start_ticks - 1)
    with RawClient(server, unseen) as raw, RawClient(server, process) as seen:
        answer = raw.attach()
        assert answer.code == "process" and "have to see each other's processes" in answer.reason
        assert isinstance(seen.attach(), messages.Attached)
        assert seen.ask(messages.Stats()).num_readers == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fingerprint": b"x"}, "fingerprint has 1 bytes; it needs 16"),
        ({"num_ranks": 9}, "9 ranks on one node"),
        ({"bundle_bytes": 100}, "a positive multiple of 64"),
    ],
)
def test_a_layout_that_no_arena_can_have_is_refused(server, changes, text):
    with RawClient(server) as raw:
        answer = raw.attach(**changes)
        assert answer.code == "layout" and text in answer.reason
        assert isinstance(raw.attach(), messages.Attached), "the server is as it was"


def test_what_cannot_be_decoded_is_refused_and_the_next_call_answered(server):
    with RawClient(server) as raw:
        for payload in (b"", b"\xff\x00", msgspec.msgpack.encode([1, ["no_such_call"]])):
            raw.socket.send(payload)
            assert raw.receive(messages.UNANSWERED).code == "undecodable"
        assert isinstance(raw.ask(messages.Stats()), messages.StatsReply)


def test_unanswered_calls_are_done_without_a_reply(server):
    with RawClient(server) as raw:
        raw.attach()
        commit_chain(server, raw, "a")
        raw.socket.send(msgspec.msgpack.encode(Call(messages.UNANSWERED, messages.Clear())))
        assert raw.ask(messages.Lookup([key("a")])).locations == [None]


def test_a_corrupt_page_goes_with_all_that_continue_it(server):
    with RawClient(server) as raw:
        raw.attach()
        locations = [result.location for result in commit_chain(server, raw, "abc")]
        stale = Location(locations[1].slot, locations[1].epoch + 2)
        assert raw.ask(messages.ReportCorrupt(stale, "load")) == messages.Done(0)
        assert raw.ask(messages.ReportCorrupt(locations[1], "load")) == messages.Done(2)
        assert raw.ask(messages.Lookup([key(name) for name in "abc"])).locations == [locations[0], None, None]
        counts = {(count.name, count.reason): count.value for count in raw.ask(messages.Stats()).counts}
        assert counts["dropped", "load"] == 2


def test_pins_over_the_budget_pin_nothing(server):
    with RawClient(server) as raw:
        raw.attach()
        commit_chain(server, raw, range(40))
        answer = raw.ask(messages.Pin([key(1), key(35)]))
        assert answer.code == "pin_budget" and f"over the budget of {NUM_SLOTS // 2}" in answer.reason
        assert raw.ask(messages.Stats()).num_pinned == 0
        assert raw.ask(messages.Pin([key(2), key("x")])) == messages.Done(1)
        assert raw.ask(messages.Stats()).num_pinned == 3
        assert raw.ask(messages.Unpin([key(2), key(0)])) == messages.Done(1)
        assert raw.ask(messages.Stats()).num_pinned == 0


def test_a_damaged_store_fails_its_check(server):
    with RawClient(server) as raw:
        raw.attach()
        (result,) = commit_chain(server, raw, "a")
        server.core._arena.arena.set_checksum(result.location.slot, 0, 0)
        answer = raw.ask(messages.Check())
        assert answer.code == "check_failed" and "lacks a rank's bundle" in answer.reason


def test_what_a_dead_group_holds_is_taken_back_and_no_sooner(server, sleeper):
    process = ProcessId.of(sleeper.pid)
    with RawClient(server, process) as raw, RawClient(server) as other:
        row = raw.attach(group=3).reader_row
        other.attach(group=4)
        eventually(lambda: other.ask(messages.Stats()).num_unusable == 0)
        assert len(raw.ask(messages.GrantSlots(5)).grants) == 5
        (result,) = commit_chain(server, other, "a")
        server.core._arena.arena.lease_bytes(row)[result.location.slot] = 1
        time.sleep(0.3)
        stats = other.ask(messages.Stats())
        assert (stats.num_writing, stats.num_readers) == (5, 2), "silence is no death"
        sleeper.kill()
        sleeper.wait()
        eventually(lambda: other.ask(messages.Stats()).num_writing == 0)
        assert other.ask(messages.Stats()).num_readers == 1
        assert not server.core._arena.arena.leases.any()
        assert raw.ask(messages.GrantSlots(1)).code == "not_attached"
        other.ask(messages.Check())


def test_leases_and_their_age_are_seen(server):
    with RawClient(server) as raw:
        row = raw.attach().reader_row
        (result,) = commit_chain(server, raw, "a")
        leases = server.core._arena.arena.lease_bytes(row)
        leases[result.location.slot] = 1
        stats = eventually(lambda: (found := raw.ask(messages.Stats())).oldest_lease_s > 0.9 and found)
        assert stats.num_leased == 1
        leases[result.location.slot] = 0
        eventually(lambda: raw.ask(messages.Stats()).num_leased == 0)


def test_relocations_since_a_version_or_all(server):
    with RawClient(server) as raw:
        raw.attach()
        commit_chain(server, raw, "a")
        version = raw.version
        commit_chain(server, raw, "b")
        changes = raw.ask(messages.ChangesSince(version))
        assert isinstance(changes, Changes) and [change.key for change in changes.changes] == [key("b")]
        snapshot = raw.ask(messages.ChangesSince(Version(version.incarnation - 1, 1)))
        assert isinstance(snapshot, Snapshot)
        assert {stored.key for stored in snapshot.stored} == {key("a"), key("b")}


def test_free_slots_are_kept_by_evicting_when_idle(tmp_path):
    config = CacheConfig(host_cache_gb=CONFIG.host_cache_gb, min_free_ratio=0.2, target_free_ratio=0.4)
    with serving(tmp_path, config) as server, RawClient(server) as raw:
        raw.attach()
        for start in range(0, 60, 10):
            commit_chain(server, raw, range(start, start + 10))
        eventually(lambda: raw.ask(messages.Stats()).num_free >= 0.4 * NUM_SLOTS)
        raw.ask(messages.Check())


def test_calls_from_the_command_line(server, tmp_path):
    assert call_once(server.core.endpoint, SECRET, messages.Clear(), 5.0) == messages.Done(0)
    with pytest.raises(CallError, match=r"the same cluster secret|disconnected"):
        call_once(server.core.endpoint, b"x" * 32, messages.Clear(), 5.0)
    with pytest.raises(CallError, match="nobody listens there"):
        call_once("tcp://127.0.0.1:1", SECRET, messages.Clear(), 5.0)
    with pytest.raises(CallError, match="cannot connect to 'nonsense'"):
        call_once("nonsense", SECRET, messages.Clear(), 5.0)
    with pytest.raises(CallError, match="the cache server refused: Detach before Attach"):
        call_once(server.core.endpoint, SECRET, messages.Detach(), 5.0)


def test_a_server_that_is_busy_is_not_waited_for(server):
    server.before_turn = lambda: time.sleep(1.0)
    with pytest.raises(CallError, match=r"did not answer within 0\.2 s"):
        call_once(server.core.endpoint, SECRET, messages.Clear(), 0.2)
    server.before_turn = None
