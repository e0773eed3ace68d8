import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import PosixPath

import pytest

from cache_service.disk_store import DiskStore, DiskStoreError
from cache_service.remote import (
    RECORD_HEADER_BYTES,
    GetStatus,
    PageBuffer,
    PutStatus,
    RecordLayout,
    RemoteStore,
)
from tests.unit.page_contract import LAYOUT, TIMEOUT_S, key_of, record_of, remove_records
from tests.unit.remote_store_contract import RemoteStoreContract

RECORD_BYTES = RECORD_HEADER_BYTES + LAYOUT.slot_bytes


class DiskHarness:
    def __init__(self, folder, max_bytes=1 << 30):
        self.folder = folder
        self.max_bytes = max_bytes
        self.store = None
        self.now_s = 1_000.0

    def open(self, layout: RecordLayout) -> RemoteStore:
        self.close()
        self.store = DiskStore(self.folder, layout, self.max_bytes, wall_clock=self.tick)
        return self.store

    def tick(self):
        self.now_s += 1.0
        return self.now_s

    def memory(self, num_bytes):
        return memoryview(bytearray(num_bytes))

    def remove(self, keys):
        remove_records(self.folder, keys)

    def plant(self, name, record):
        """While the store is open: it looks at the disk, whatever its index says."""
        (self.folder / f"{name}.page").write_bytes(record)

    def close(self):
        if self.store is not None:
            assert self.store.close(TIMEOUT_S)


@pytest.fixture
def harness(tmp_path):
    harness = DiskHarness(tmp_path / "store")
    yield harness
    harness.close()


def put(store, *numbers):
    records = []
    for number in numbers:
        data = memoryview(bytearray(number.to_bytes(8, "big") * (LAYOUT.slot_bytes // 8)))
        records.append(record_of(key_of(number), data))
    return store.put(records, TIMEOUT_S).results


def get(store, *numbers):
    buffers = [PageBuffer(key_of(number), memoryview(bytearray(LAYOUT.slot_bytes))) for number in numbers]
    return [result.status for result in store.get(buffers, TIMEOUT_S).results]


class TestDiskStore(RemoteStoreContract):
    pass


def test_bytes_are_bounded_and_the_least_recently_used_goes_first(tmp_path):
    harness = DiskHarness(tmp_path, max_bytes=3 * RECORD_BYTES)
    store = harness.open(LAYOUT)
    assert put(store, 1, 2, 3) == [PutStatus.STORED] * 3
    assert get(store, 1) == [GetStatus.FOUND]
    assert put(store, 4) == [PutStatus.STORED]
    assert get(store, 1, 2, 3, 4) == [
        GetStatus.FOUND, GetStatus.MISSING, GetStatus.FOUND, GetStatus.FOUND,
    ]  # fmt: skip
    assert (store.num_records, store.num_bytes, store.num_evicted) == (3, 3 * RECORD_BYTES, 1)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.page"))
    assert on_disk == store.num_bytes
    harness.close()


def test_pages_and_their_order_survive_a_restart(tmp_path):
    harness = DiskHarness(tmp_path, max_bytes=3 * RECORD_BYTES)
    store = harness.open(LAYOUT)
    put(store, 1, 2, 3)
    get(store, 1)
    (tmp_path / f"{LAYOUT.name(key_of(9))}.page.writing").write_bytes(b"half a page")
    store = harness.open(LAYOUT)
    assert not list(tmp_path.glob("*.writing"))
    assert store.num_bytes == 3 * RECORD_BYTES
    put(store, 4)
    assert get(store, 2, 1, 3, 4) == [GetStatus.MISSING] + [GetStatus.FOUND] * 3
    harness.max_bytes = RECORD_BYTES
    store = harness.open(LAYOUT)
    assert store.num_records == 1
    assert get(store, 4) == [GetStatus.FOUND]
    harness.close()


def test_files_of_other_formats_are_kept_until_their_turn(tmp_path):
    """Another release's pages are not ours to throw away while there is room."""
    harness = DiskHarness(tmp_path, max_bytes=3 * RECORD_BYTES)
    future = tmp_path / f"{key_of(1).hex()}-0123456789abcdef-v2.page"
    future.write_bytes(b"?" * RECORD_BYTES)
    os.utime(future, (1.0, 1.0))
    store = harness.open(LAYOUT)
    assert get(store, 1) == [GetStatus.MISSING]
    assert put(store, 1, 2) == [PutStatus.STORED] * 2
    assert future.exists()
    assert store.num_bytes == 3 * RECORD_BYTES
    assert put(store, 3) == [PutStatus.STORED]
    assert not future.exists()
    assert get(store, 1, 2, 3) == [GetStatus.FOUND] * 3
    harness.close()


def test_files_of_others_in_the_folder_are_neither_counted_nor_removed(tmp_path):
    key, layout = key_of(1).hex(), "0123456789abcdef"
    names = (
        "thesis.page", "draft.writing", "17.writing", f"{key}.page", f"{key}-{layout}.page",
        f"{key}-{layout}-v1.page.bak", f"x{key}-{layout}-v1.page", f"{key}-{layout}-v1.writing",
        f"{key.upper()}-{layout.upper()}-v1.page",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).write_bytes(b"?" * RECORD_BYTES)
    harness = DiskHarness(tmp_path, max_bytes=RECORD_BYTES)
    store = harness.open(LAYOUT)
    assert (store.num_records, store.num_bytes) == (0, 0)
    assert put(store, 1, 2) == [PutStatus.STORED] * 2
    assert {file.name for file in tmp_path.iterdir()} - set(names) == {
        "in-use.lock", f"{LAYOUT.name(key_of(2))}.page",
    }  # fmt: skip
    assert all((tmp_path / name).exists() for name in names)
    harness.close()


def test_pages_are_their_users_only(tmp_path):
    program = f"""
        import os
        from pathlib import Path
        from tests.unit.test_disk_store import LAYOUT, DiskStore, put
        os.umask(0)
        for name in ("made", "given"):
            store = DiskStore(Path({str(tmp_path)!r}) / name, LAYOUT, 1 << 30)
            put(store, 1)
            assert store.close(5.0)
    """
    (tmp_path / "given").mkdir()
    (tmp_path / "given").chmod(0o750)
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made", tmp_path / "given")}
    assert modes == {"made": 0o700, "given": 0o750}, "a folder that exists keeps its mode"
    files = [file for folder in tmp_path.iterdir() for file in folder.iterdir()]
    assert {(file.suffix, file.stat().st_mode & 0o777) for file in files} == {
        (".lock", 0o600), (".page", 0o600),
    }  # fmt: skip


def test_pages_are_listed_after_a_restart_by_their_last_use_those_of_other_layouts_left_out(harness):
    store = harness.open(LAYOUT)
    put(store, 1, 2, 3)
    get(store, 1)
    for name in (f"{key_of(4).hex()}-0123456789abcdef-v1", LAYOUT.name(key_of(5)) + "2"):
        harness.plant(name, b"?" * 100)
    store = harness.open(LAYOUT)
    assert store.known_keys() == [key_of(2), key_of(3), key_of(1)]
    assert store.num_records == 5


def test_a_file_that_vanished_is_a_miss_and_its_bytes_are_free(harness):
    store = harness.open(LAYOUT)
    put(store, 1, 2)
    (harness.folder / f"{LAYOUT.name(key_of(1))}.page").unlink()
    assert get(store, 1, 2) == [GetStatus.MISSING, GetStatus.FOUND]
    assert store.num_bytes == RECORD_BYTES


def test_a_file_that_is_in_no_account_is_in_it_once_its_page_is_put(harness):
    store = harness.open(LAYOUT)
    put(store, 1)
    path = harness.folder / f"{LAYOUT.name(key_of(1))}.page"
    record = path.read_bytes()
    path.unlink()
    assert get(store, 1) == [GetStatus.MISSING]
    path.write_bytes(record)
    assert put(store, 1) == [PutStatus.PRESENT]
    assert (store.num_records, store.num_bytes) == (1, RECORD_BYTES)
    assert get(store, 1) == [GetStatus.FOUND]


class RacingFolder(PosixPath):
    """A folder in which something happens between looking for a file in vain and saying so."""

    meanwhile = None

    def open(self, *arguments, **options):
        try:
            return super().open(*arguments, **options)
        except FileNotFoundError:
            RacingFolder.meanwhile()
            raise


def test_a_page_that_is_put_while_it_is_looked_for_stays_in_the_account(tmp_path):
    harness = DiskHarness(RacingFolder(tmp_path / "store"))
    store = harness.open(LAYOUT)
    RacingFolder.meanwhile = lambda: put(store, 1)
    assert get(store, 1) == [GetStatus.MISSING]
    assert (store.num_records, store.num_bytes) == (1, RECORD_BYTES)
    harness.close()


@pytest.mark.parametrize("ending", [".page", ".page.writing"])
def test_what_no_record_can_be_is_named_and_the_folder_is_free_for_the_next_try(harness, ending):
    harness.folder.mkdir()
    found = harness.folder / f"{LAYOUT.name(key_of(1))}{ending}"
    found.mkdir()
    for _ in range(2):
        with pytest.raises(DiskStoreError, match=f"{found.name} is named as a record and is no file; move"):
            DiskStore(harness.folder, LAYOUT, 1 << 30)
    found.rmdir()
    assert put(harness.open(LAYOUT), 1) == [PutStatus.STORED]


def test_a_folder_that_cannot_be_locked_is_named_and_nothing_of_it_stays_open(harness):
    descriptors = []

    def lock(descriptor, operation):
        descriptors.append(descriptor)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.raises(DiskStoreError, match="cannot be locked: No locks available; give a folder on"):
        DiskStore(harness.folder, LAYOUT, 1 << 30, lock=lock)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_a_folder_has_one_owner(harness):
    harness.open(LAYOUT)
    with pytest.raises(DiskStoreError, match="is in use by another process"):
        DiskStore(harness.folder, LAYOUT, 1 << 30)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskStoreError, match=r"file/store: .*; give a folder"):
        DiskStore(tmp_path / "file" / "store", LAYOUT, 1 << 30)


def test_a_bound_below_one_page_is_refused(tmp_path):
    with pytest.raises(DiskStoreError, match=f"holds no page: one takes {RECORD_BYTES}"):
        DiskStore(tmp_path, LAYOUT, RECORD_BYTES - 1)


def test_a_killed_writer_leaves_whole_files_only(tmp_path):
    """SIGKILL while it writes: what is there afterwards is read and right, and nothing half written stays."""
    program = f"""
        import sys
        from pathlib import Path
        from tests.unit.test_disk_store import LAYOUT, DiskStore, put
        store = DiskStore(Path({str(tmp_path)!r}), LAYOUT, 1 << 30)
        number = 0
        while True:
            put(store, *range(number, number + 16))
            number += 16
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    end_s = time.monotonic() + 60
    while len(list(tmp_path.glob("*.page"))) < 64 and time.monotonic() < end_s:
        time.sleep(0.01)
    process.kill()
    process.wait(10)
    harness = DiskHarness(tmp_path)
    store = harness.open(LAYOUT)
    num_records = store.num_records
    assert num_records >= 64
    statuses = get(store, *range(num_records))
    assert statuses == [GetStatus.FOUND] * num_records
    harness.close()


@pytest.fixture
def mount_namespace():
    can_be_had = shutil.which("unshare") is not None
    if (
        not can_be_had
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs a mount namespace for a small disk")


@pytest.mark.usefixtures("mount_namespace")
def test_a_full_disk_is_a_counted_failure(tmp_path):
    program = f"""
        from pathlib import Path
        from tests.unit.test_disk_store import (
            LAYOUT, DiskStore, GetStatus, PutStatus, get, key_of, put
        )
        store = DiskStore(Path({str(tmp_path)!r}), LAYOUT, 1 << 30)
        statuses = put(store, *range(60))
        stored = [n for n, status in enumerate(statuses) if status is PutStatus.STORED]
        assert set(statuses) == {{PutStatus.STORED, PutStatus.FULL}}, set(statuses)
        assert store.stats.failures["put: No space left on device"] == 60 - len(stored)
        assert set(get(store, *stored)) == {{GetStatus.FOUND}}
        assert not list(Path({str(tmp_path)!r}).glob("*.writing"))
        next(Path({str(tmp_path)!r}).glob("*.page")).unlink()
        assert put(store, 99) == [PutStatus.STORED]
        assert store.close(5.0)
    """
    script = 'mount -t tmpfs -o size=256k tmpfs "$1" && exec "$2" -c "$3"'
    arguments = ["sh", str(tmp_path), sys.executable, textwrap.dedent(program)]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
