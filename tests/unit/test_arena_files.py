"""The arena's file: created with its memory checked, owned once, adopted, wiped, swept, removed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import PosixPath

import pytest

from cache_service import arena_format
from cache_service.arena import Arena, ArenaMismatchError
from cache_service.arena_files import (
    ArenaOwnedError,
    OwnedArena,
    arena_path,
    settle_orphan,
    sweep_dead_clusters,
)
from cache_service.arena_format import ArenaSizeError, ArenaSpec
from cache_service.host_memory import HostMemory
from cache_service.processes import ProcessId
from tests.unit.arenas import FINGERPRINT, PLENTY, kill, open_arena, spec

OWN_AND_SLEEP = """
import sys, time
from pathlib import Path
from tests.unit.arenas import open_arena, spec
owned = open_arena(Path(sys.argv[1]), spec(cluster_id=sys.argv[2]))
print("owned", flush=True)
time.sleep(60)
"""


def owner_process(folder, cluster_id="test"):
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_AND_SLEEP, str(folder), cluster_id], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"owned\n"
    return process


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()


def test_a_fresh_arena_is_whole_private_and_gone_after_a_clean_stop(tmp_path):
    owned = open_arena(tmp_path)
    status = owned.arena.path.stat()
    assert not owned.is_adopted
    assert (status.st_size, status.st_mode & 0o777) == (spec().file_bytes, 0o600)
    assert status.st_blocks * 512 >= spec().file_bytes, "prefaulted"
    owned.close()
    owned.close()
    assert not list(tmp_path.iterdir())


def test_the_name_says_cluster_and_node_in_any_address_family(tmp_path):
    assert arena_path("c1", "10.0.0.7").as_posix() == "/dev/shm/eyrie-c1-10.0.0.7.arena"
    assert arena_path("c1", "fe80::1%eth0", tmp_path).name == "eyrie-c1-fe80__1_eth0.arena"


def test_an_orphan_of_the_same_spec_is_adopted_under_a_higher_incarnation(tmp_path):
    first = open_arena(tmp_path, incarnation=70)
    first.arena.bundle(3, 0)[:4] = b"page"
    kill(first)
    second = open_arena(tmp_path, incarnation=5, prefault=False)
    assert second.is_adopted
    assert second.arena.incarnation == 71
    assert second.arena.num_usable_slots == 8
    assert second.arena.bundle(3, 0)[:4] == b"page"
    second.close()


def test_a_wiped_arena_begins_at_the_incarnation_it_is_given(tmp_path):
    owned = open_arena(tmp_path, incarnation=70)
    assert owned.arena.incarnation == 70
    owned.close()


def wiped(tmp_path, caplog):
    second = open_arena(tmp_path)
    assert not second.is_adopted
    assert second.arena.bundle(0, 0)[:4] == bytes(4)
    second.close()
    (record,) = [record for record in caplog.records if "wiped" in record.message]
    return record.reason


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (spec(bundle_bytes=512), "its bundle_bytes is 512, ours is 256"),
        (spec(num_slots=9), "its num_slots is 9, ours is 8"),
        (spec(num_ranks=2), "its num_ranks is 2, ours is 1"),
        (spec(fingerprint=bytes(16)), "its fingerprint is 0000"),
    ],
)
def test_an_arena_of_another_layout_or_model_is_wiped(tmp_path, caplog, other, reason):
    first = open_arena(tmp_path, other)
    first.arena.bundle(0, 0)[:4] = b"page"
    kill(first)
    assert wiped(tmp_path, caplog).startswith(reason)


def test_an_arena_of_a_future_format_version_is_wiped(tmp_path, caplog):
    first = open_arena(tmp_path)
    first.arena.bundle(0, 0)[:4] = b"page"
    path = first.arena.path
    kill(first)
    octets = bytearray(path.read_bytes())
    octets[8:12] = (arena_format.FORMAT_VERSION + 41).to_bytes(4, "little")
    path.write_bytes(octets)
    assert wiped(tmp_path, caplog) == "its format version is 42, ours is 1"


@pytest.mark.parametrize("octets", [b"x", bytes(9000), b"EYRIEKV\0" + b"\1\0\0\0" + b"\xff" * 5000])
def test_whatever_is_no_arena_is_wiped(tmp_path, caplog, octets):
    arena_path("test", "127.0.0.1", tmp_path).write_bytes(octets)
    assert wiped(tmp_path, caplog) in {"it is no arena", "its header is damaged"}


def test_a_file_cut_short_is_wiped_and_not_mapped(tmp_path, caplog):
    first = open_arena(tmp_path)
    path = first.arena.path
    kill(first)
    os.truncate(path, spec().file_bytes - 256)
    with pytest.raises(ArenaMismatchError, match="cut short"):
        Arena.map(path, spec())
    assert wiped(tmp_path, caplog) == "its file is cut short"


def test_a_second_server_on_the_node_is_refused_while_the_first_lives(tmp_path):
    process = owner_process(tmp_path)
    with pytest.raises(ArenaOwnedError, match=f"owned by the live process {process.pid}: one CacheServer"):
        open_arena(tmp_path)
    end(process)
    second = open_arena(tmp_path)
    assert second.is_adopted
    with pytest.raises(ArenaOwnedError):
        open_arena(tmp_path)
    second.close()


def test_a_worker_maps_only_what_it_was_built_for(tmp_path):
    owned = open_arena(tmp_path)
    reader = Arena.map(owned.arena.path, spec())
    owned.arena.bundle(7, 0)[-4:] = b"last"
    assert reader.bundle(7, 0)[-4:] == b"last"
    reader.close()
    with pytest.raises(ArenaMismatchError, match="its num_ranks is 1, ours is 2"):
        Arena.map(owned.arena.path, spec(num_ranks=2))
    owned.close()


def test_sweeping_takes_dead_clusters_and_leaves_everything_else(tmp_path):
    kill(open_arena(tmp_path, spec(cluster_id="dead")))
    kill(open_arena(tmp_path, spec(cluster_id="ours")))
    open_arena(tmp_path, spec(cluster_id="kept")).close(keep=True)
    read = open_arena(tmp_path, spec(cluster_id="read"))
    reader = ProcessId.current()
    read.arena.set_row_word(2, arena_format.ROW_PID_WORD, reader.pid)
    read.arena.set_row_word(2, arena_format.ROW_START_WORD, reader.start_ticks)
    kill(read)
    (tmp_path / "eyrie-foreign-1.arena").write_bytes(b"EYRIEKV\0\x2a\0\0\0" + bytes(5000))
    (tmp_path / "something-else").write_bytes(b"")
    process = owner_process(tmp_path, "alive")
    assert [path.name for path in sweep_dead_clusters("ours", tmp_path)] == ["eyrie-dead-127.0.0.1.arena"]
    end(process)
    left = {path.name.removesuffix("-127.0.0.1.arena") for path in tmp_path.iterdir()}
    assert left == {
        "eyrie-ours", "eyrie-kept", "eyrie-read", "eyrie-alive", "eyrie-foreign-1.arena", "something-else",
    }  # fmt: skip


def test_an_orphan_is_removed_and_the_arena_of_a_living_owner_is_not(tmp_path):
    kill(open_arena(tmp_path, spec(cluster_id="dead")))
    process = owner_process(tmp_path, "alive")
    try:
        assert settle_orphan(arena_path("dead", "127.0.0.1", tmp_path), keep=False)
        assert not settle_orphan(arena_path("dead", "127.0.0.1", tmp_path), keep=False), "it is gone"
        assert not settle_orphan(arena_path("alive", "127.0.0.1", tmp_path), keep=False, patience_s=0.1)
        assert [path.name for path in tmp_path.iterdir()] == ["eyrie-alive-127.0.0.1.arena"]
    finally:
        end(process)


def test_an_orphan_is_removed_once_its_dying_owner_is_gone(tmp_path):
    process = owner_process(tmp_path, "dying")
    threading.Timer(0.3, process.kill).start()
    try:
        assert settle_orphan(arena_path("dying", "127.0.0.1", tmp_path), keep=False)
        assert list(tmp_path.iterdir()) == []
    finally:
        end(process)


class RenewedPath(PosixPath):
    """A path whose file another server has replaced since it was opened and before it was locked."""

    renew = None

    def stat(self, **options):
        self._renew_once()
        return super().stat(**options)

    def unlink(self, **options):
        self._renew_once()
        super().unlink(**options)

    def _renew_once(self):
        renew = RenewedPath.renew
        if renew is not None and self.suffix == ".arena":
            RenewedPath.renew = None
            renew()


@pytest.mark.parametrize("keep", [False, True])
def test_an_arena_that_took_the_orphan_s_name_meanwhile_is_left_alone(tmp_path, keep):
    dead = open_arena(tmp_path, spec(cluster_id="dead"))
    path = dead.arena.path
    kill(dead)
    living = []

    def renew():
        path.unlink()
        living.append(open_arena(tmp_path, spec(cluster_id="dead")))

    RenewedPath.renew = renew
    assert not settle_orphan(RenewedPath(path), keep=keep)
    assert path.exists() and living
    assert living[0].arena.word(arena_format.KEPT_WORD) == 0
    living[0].close()


def test_a_swept_arena_s_name_may_be_another_arena_s_meanwhile(tmp_path):
    dead = open_arena(tmp_path, spec(cluster_id="dead"))
    path = dead.arena.path
    kill(dead)
    living = []

    def renew():
        path.unlink()
        living.append(open_arena(tmp_path, spec(cluster_id="dead")))

    RenewedPath.renew = renew
    assert sweep_dead_clusters("ours", RenewedPath(tmp_path)) == []
    assert path.exists() and living
    living[0].close()


def test_an_orphan_that_is_to_be_kept_is_left_by_others(tmp_path):
    kill(open_arena(tmp_path, spec(cluster_id="dead")))
    assert settle_orphan(arena_path("dead", "127.0.0.1", tmp_path), keep=True)
    assert sweep_dead_clusters("ours", tmp_path) == []
    again = open_arena(tmp_path, spec(cluster_id="dead"))
    assert again.is_adopted
    again.close()


def test_a_kept_arena_of_a_server_that_ended_well_is_no_orphan_to_settle(tmp_path):
    open_arena(tmp_path, spec(cluster_id="kept")).close(keep=True)
    path = arena_path("kept", "127.0.0.1", tmp_path)
    assert not settle_orphan(path, keep=True) and path.exists()
    kill(open_arena(tmp_path, spec(cluster_id="kept")))
    assert settle_orphan(path, keep=True), "this one was killed"


def test_a_kept_arena_is_adopted_and_then_no_longer_kept(tmp_path):
    open_arena(tmp_path, spec(cluster_id="kept")).close(keep=True)
    again = open_arena(tmp_path, spec(cluster_id="kept"))
    assert again.is_adopted
    kill(again)
    assert len(sweep_dead_clusters("ours", tmp_path)) == 1


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (HostMemory(10_000, None, 1 << 40), r"this machine has 0\.000 GiB free memory"),
        (HostMemory(1 << 40, 10_000, 1 << 40), r"this container has .* left of its memory limit"),
        (HostMemory(1 << 40, None, 10_000), r"has 0\.000 GiB free space.*enlarge the folder"),
    ],
)
def test_an_arena_larger_than_memory_is_refused_and_leaves_no_file(tmp_path, memory, words):
    with pytest.raises(ArenaSizeError, match=words) as refusal:
        open_arena(tmp_path, memory=memory)
    assert "--host-cache-gb" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_adopting_needs_no_more_memory_than_the_orphan_has(tmp_path):
    kill(open_arena(tmp_path))
    owned = open_arena(tmp_path, memory=HostMemory(0, 0, 0))
    assert owned.is_adopted
    owned.close()


def test_a_size_that_holds_no_page_is_refused():
    with pytest.raises(ArenaSizeError, match="raise --host-cache-gb"):
        ArenaSpec.of_size("c", FINGERPRINT, 1 << 20, 2, 1 << 20)


@pytest.mark.parametrize("bundle_bytes", [256, 4096, 65_536, 1 << 20])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_an_arena_of_a_size_fills_it_but_for_a_slot_and_alignment(bundle_bytes, num_ranks):
    total = 64 << 20
    found = ArenaSpec.of_size("c", FINGERPRINT, bundle_bytes, num_ranks, total)
    assert total - found.slot_bytes - 256 - 20_480 < found.file_bytes <= total
    assert found.data_offset % 4096 == 0 and found.row_bytes % 64 == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bundle_bytes": 100}, "multiple of 64"),
        ({"num_ranks": 9}, "9 ranks on one node"),
        ({"cluster_id": "a/b"}, "without '/'"),
        ({"fingerprint": b"short"}, "has 5 bytes"),
        ({"num_slots": 0}, "--host-cache-gb"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        spec(**fields)


def test_a_file_that_cannot_be_made_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        OwnedArena.open(tmp_path / "missing" / "x.arena", spec(), 1, lambda folder: PLENTY)


def test_a_view_that_outlives_a_clean_stop_does_not_keep_the_arena_owned(tmp_path):
    owned = open_arena(tmp_path)
    view = owned.arena.bundle(0, 0)
    owned.close(keep=True)
    again = open_arena(tmp_path)
    assert again.is_adopted
    view[:4] = b"late"
    again.close()
