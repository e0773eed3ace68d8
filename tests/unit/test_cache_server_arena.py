"""Which arena a CacheServer has: made, taken over, replaced, kept, refused."""

import os
import subprocess
import sys
import threading
import time

import pytest

from cache_service import messages
from cache_service.arena_files import ArenaOwnedError, arena_path
from cache_service.arena_format import ArenaSizeError
from cache_service.config import CacheConfig
from cache_service.gate import BindError
from cache_service.host_memory import HostMemory
from cache_service.identity import cluster_id_of
from cache_service.native.build import NativeBuildError
from cache_service.processes import ProcessId
from cache_service.server import CacheServerCore, Place
from tests.unit.arenas import PLENTY, key, kill, open_arena, spec
from tests.unit.cache_nodes import (
    BUNDLE_BYTES,
    CONFIG,
    NUM_SLOTS,
    SECRET,
    TIMEOUT_S,
    eventually,
    make_core,
    new_client,
    port_of,
    serving,
    store_chain,
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


def test_pages_larger_than_the_cache_are_refused(server):
    with RawClient(server) as raw:
        answer = raw.attach(bundle_bytes=128 * BUNDLE_BYTES)
        assert answer.code == "arena_size" and "raise --host-cache-gb" in answer.reason


def test_without_a_compiler_for_the_fence_no_server_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"install g\+\+ for the compiled fence"):
        make_core(tmp_path)


def test_an_arena_that_cannot_be_made_is_refused_and_can_be_made_later(tmp_path):
    folder = tmp_path / "shm"
    folder.mkdir()
    with serving(folder) as server, RawClient(server) as raw:
        folder.rmdir()
        answer = raw.attach()
        assert answer.code == "arena_file" and "No such file or directory" in answer.reason
        folder.mkdir()
        assert raw.attach().num_slots == NUM_SLOTS


def test_an_arena_found_when_the_first_worker_comes_is_taken_over_under_the_server_s_incarnation(tmp_path):
    with serving(tmp_path) as server:
        wanted = spec(NUM_SLOTS, BUNDLE_BYTES, 1, cluster_id_of(SECRET), 64)
        kill(open_arena(tmp_path, wanted, incarnation=1 << 62))
        client = new_client(server.core.endpoint)
        store_chain(client, "ab")
        assert client.arena.incarnation == client.subscriber.follower.applied.incarnation
        client.close()


def test_another_layout_replaces_an_arena_that_nobody_uses(server, sleeper):
    with RawClient(server, ProcessId.of(sleeper.pid)) as first, RawClient(server) as second:
        first.attach()
        commit_chain(server, first, "ab")
        version = first.version
        assert second.attach(bundle_bytes=2 * BUNDLE_BYTES).code == "layout"
        sleeper.kill()
        sleeper.wait()
        attached = second.attach(bundle_bytes=2 * BUNDLE_BYTES)
        assert attached.num_slots == NUM_SLOTS // 2
        assert second.ask(messages.Lookup([key("a"), key("b")])).locations == [None, None]
        changes = second.ask(messages.ChangesSince(version))
        assert {change.key for change in changes.changes} == {key("a"), key("b")}, "subscribers hear of it"
        second.ask(messages.Check())


def test_a_clean_stop_removes_the_arena_unless_it_is_kept(tmp_path):
    for keeps in (True, False):
        config = CacheConfig(host_cache_gb=CONFIG.host_cache_gb, keep_arena=keeps)
        with serving(tmp_path, config) as server, RawClient(server) as raw:
            raw.attach()
            if keeps:
                commit_chain(server, raw, "ab")
            else:
                assert None not in raw.ask(messages.Lookup([key("a"), key("b")])).locations
        assert bool(list(tmp_path.glob("*.arena"))) == keeps


def test_a_kept_arena_of_another_size_is_wiped(tmp_path):
    with (
        serving(tmp_path, CacheConfig(host_cache_gb=CONFIG.host_cache_gb, keep_arena=True)) as server,
        RawClient(server) as raw,
    ):
        raw.attach()
        commit_chain(server, raw, "a")
    with (
        serving(tmp_path, CacheConfig(host_cache_gb=2 * CONFIG.host_cache_gb)) as server,
        RawClient(server) as raw,
    ):
        assert raw.attach().num_slots > 100
        assert raw.ask(messages.Lookup([key("a")])).locations == [None]


@pytest.mark.parametrize("format_version", [1, 99])
def test_what_an_arena_to_be_wiped_takes_of_the_memory_does_not_count(tmp_path, format_version):
    def read_memory(folder):
        """Room for one arena and a half of the second size."""
        used = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
        return HostMemory(1 << 40, None, int(3 * CONFIG.host_cache_gb * 2**30) - used)

    def core(config):
        place = Place("127.0.0.1", folder=tmp_path)
        return CacheServerCore(config, SECRET, place, time.time_ns(), read_memory=read_memory)

    kept = CacheConfig(host_cache_gb=2 * CONFIG.host_cache_gb, keep_arena=True)
    with serving(tmp_path, kept) as server, RawClient(server) as raw:
        raw.attach()
        eventually(lambda: raw.ask(messages.Stats()).num_unusable == 0)
    path = arena_path(cluster_id_of(SECRET), "127.0.0.1", tmp_path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(format_version.to_bytes(4, "little"))
    other = core(CacheConfig(host_cache_gb=2.5 * CONFIG.host_cache_gb))
    assert not path.exists() or path.stat().st_size > 2.4 * CONFIG.host_cache_gb * 2**30
    other.stop()
    other.run()


def test_a_second_server_of_the_node_is_refused(tmp_path):
    with serving(tmp_path) as server, RawClient(server) as raw:
        raw.attach()
        with pytest.raises(ArenaOwnedError, match=f"owned by the live process {os.getpid()}"):
            make_core(tmp_path, patience_s=0.0)
        # One that started before there was an arena finds out when a worker comes.
    with (
        serving(tmp_path) as first,
        serving(tmp_path) as second,
        RawClient(first) as raw,
        RawClient(second) as other,
    ):
        raw.attach()
        answer = other.attach()
        assert answer.code == "arena_owned" and "one CacheServer runs per node" in answer.reason


def test_a_server_waits_for_its_predecessor_to_exit(tmp_path):
    former = open_arena(tmp_path, spec(cluster_id=cluster_id_of(SECRET), num_readers=64))
    timer = threading.Timer(0.5, kill, [former])
    timer.start()
    begun_s = time.monotonic()
    with serving(tmp_path, patience_s=TIMEOUT_S):
        assert time.monotonic() - begun_s > 0.4
        assert not timer.is_alive()


def test_a_cache_larger_than_the_memory_is_refused_at_once(tmp_path):
    def core(config, memory):
        return CacheServerCore(
            config, SECRET, Place("127.0.0.1", folder=tmp_path), 1, read_memory=lambda folder: memory
        )

    with pytest.raises(
        ArenaSizeError, match=r"needs 5\.000 GiB, but this machine has 4\.000 GiB free memory"
    ):
        core(CacheConfig(host_cache_gb=5), HostMemory(4 << 30, None, 10**12))
    with pytest.raises(ArenaSizeError, match="left of its memory limit"):
        core(CacheConfig(host_cache_gb=5), HostMemory(10**12, 10**9, 10**12))
    with pytest.raises(ArenaSizeError, match="give --host-cache-gb or --host-cache-ratio"):
        core(CacheConfig(), HostMemory(10**12, None, 10**12))
    assert not list(tmp_path.iterdir())


def test_a_ratio_is_of_what_is_free_and_keeps_an_orphan_as_it_is(tmp_path):
    config = CacheConfig(host_cache_ratio=0.5)
    assert config.arena_bytes(HostMemory(100, None, 80)) == 40
    assert config.arena_bytes(HostMemory(100, 60, 80)) == 30
    with (
        serving(tmp_path, CacheConfig(host_cache_gb=CONFIG.host_cache_gb, keep_arena=True)) as server,
        RawClient(server) as raw,
    ):
        raw.attach()
        commit_chain(server, raw, "a")
    with serving(tmp_path, config) as server, RawClient(server) as raw:
        assert raw.attach().num_slots == NUM_SLOTS
        assert raw.ask(messages.Lookup([key("a")])).locations != [None]


def test_a_port_in_use_is_named_and_nothing_is_left(tmp_path, server):
    for place in ({"port": port_of(server.core.endpoint)}, {"broadcast_port": port_of(server.core.endpoint)}):
        with pytest.raises(BindError, match=r"cannot bind to 127\.0\.0\.1:"):
            make_core(tmp_path / "other", **place)
    with pytest.raises(BindError, match="every interface"):
        CacheServerCore(
            CONFIG, SECRET, Place("0.0.0.0", folder=tmp_path), 1, read_memory=lambda folder: PLENTY
        )


def test_arenas_of_dead_clusters_are_swept(tmp_path):
    with serving(tmp_path) as server:
        client = new_client(server.core.endpoint)
        store_chain(client, "a")
        path = arena_path(cluster_id_of(SECRET), "127.0.0.1", tmp_path)
        dead = arena_path("deadbeef", "127.0.0.1", tmp_path)
        data = bytearray(path.read_bytes())
        data[16 : 16 + 64] = b"deadbeef".ljust(64, b"\0")
        for row in range(64):  # its readers are gone
            start = client.arena.spec.rows_offset + row * client.arena.spec.row_bytes
            data[start : start + 24] = bytes(24)
        dead.write_bytes(data)
        client.close()
    with serving(tmp_path):
        assert not dead.exists()
