"""The contract against a real master; Mooncake is optional, so without it there is nothing to test."""

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cache_service.remote import GetStatus, PageBuffer, PutStatus, RecordLayout, RemoteStore
from tests.unit.mooncake_master import MooncakeMaster, free_port, has_mooncake
from tests.unit.page_contract import LAYOUT, TIMEOUT_S, key_of, record_of
from tests.unit.remote_store_contract import RemoteStoreContract

if not has_mooncake():
    pytest.skip("Mooncake cannot be imported: no wheel or no libibverbs1", allow_module_level=True)

from cache_service.mooncake_library import MooncakeError, MooncakeOptions, load_store
from cache_service.mooncake_store import MooncakeStore

pytestmark = pytest.mark.slow  # a master, hung peers and own deadlines: mostly waiting

OPTIONS = MooncakeOptions("127.0.0.1")
MEMORY_BYTES = 64 << 20


class SegmentOwner:
    """A plain member of the store, whose memory holds the records."""

    def __init__(self, master: MooncakeMaster):
        self.store = load_store(OPTIONS).MooncakeDistributedStore()
        code = self.store.setup("127.0.0.1", "P2PHANDSHAKE", 128 << 20, 16 << 20, "tcp", "", master.endpoint)
        assert code == 0


class MooncakeHarness:
    """One master, one member that holds the records; the stores under test come and go."""

    def __init__(self, log):
        self.master = MooncakeMaster(log)
        self.owner = SegmentOwner(self.master).store
        self.memory_map = mmap.mmap(-1, MEMORY_BYTES)
        self.used = 0
        self.stores = []

    def open(self, layout: RecordLayout) -> RemoteStore:
        for store in self.stores[-1:]:
            store.close(0.0)  # takes a second, which nobody has to wait for
        memory = memoryview(self.memory_map)
        self.stores.append(MooncakeStore(self.master.endpoint, layout, memory, OPTIONS))
        return self.stores[-1]

    def begin(self):
        self.used = 0
        self.owner.remove_all(True)

    def memory(self, num_bytes):
        start, self.used = self.used, self.used + num_bytes
        assert self.used <= MEMORY_BYTES
        return memoryview(self.memory_map)[start : self.used]

    def remove(self, keys):
        self.owner.batch_remove([f"eyrie/{LAYOUT.name(key)}" for key in keys], True)

    def plant(self, name, record):
        assert self.owner.put(f"eyrie/{name}", record) == 0

    def close(self):
        for store in self.stores:
            assert store.close(TIMEOUT_S)
        self.owner.close()
        self.master.kill()


@pytest.fixture(scope="module")
def shared_harness(tmp_path_factory):
    harness = MooncakeHarness(tmp_path_factory.mktemp("mooncake") / "master.log")
    yield harness
    harness.close()


@pytest.fixture
def harness(shared_harness):
    shared_harness.begin()
    return shared_harness


class TestMooncakeStore(RemoteStoreContract):
    removes_under_readers = True


def test_a_master_nobody_started_is_named_at_once():
    began_s = time.monotonic()
    with pytest.raises(
        MooncakeError, match=r"no Mooncake master at 127\.0\.0\.1:\d+: .*start mooncake_master"
    ):
        MooncakeStore(f"127.0.0.1:{free_port()}", LAYOUT, memoryview(bytearray(8_192)), OPTIONS)
    assert time.monotonic() - began_s < 5
    with pytest.raises(MooncakeError, match="expected host:port"):
        MooncakeStore("somewhere", LAYOUT, memoryview(bytearray(8_192)), OPTIONS)


OWNER = """
    import sys
    from tests.unit.test_mooncake_store import OPTIONS, load_store
    store = load_store(OPTIONS).MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 128 << 20, 16 << 20, "tcp", "", sys.argv[1]) == 0
    print("ready", flush=True)
    sys.stdin.read()
"""


def pages_in(memory, numbers):
    records, buffers = [], []
    size = LAYOUT.slot_bytes
    for place, number in enumerate(numbers):
        data = memory[2 * place * size : (2 * place + 1) * size]
        data[:] = number.to_bytes(8, "big") * (size // 8)
        records.append(record_of(key_of(number), data))
        buffers.append(PageBuffer(key_of(number), memory[(2 * place + 1) * size : (2 * place + 2) * size]))
    return records, buffers


def statuses(batch):
    return {result.status for result in batch.results}


def test_the_masters_death_is_a_miss_in_time_and_its_return_is_noticed(tmp_path):
    master = MooncakeMaster(tmp_path / "master.log")
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    store = MooncakeStore(master.endpoint, LAYOUT, memory, OPTIONS, segment_bytes=64 << 20)
    records, buffers = pages_in(memory, range(8))
    assert store.put(records, TIMEOUT_S).results == [PutStatus.STORED] * 8
    assert statuses(store.get(buffers, TIMEOUT_S)) == {GetStatus.FOUND}
    master.kill()
    began_s = time.monotonic()
    get, put = store.get(buffers, 1.0), store.put(records, 1.0)
    assert time.monotonic() - began_s < 3.0
    assert statuses(get) <= {GetStatus.FAILED, GetStatus.TIMED_OUT}
    assert set(put.results) <= {PutStatus.FAILED, PutStatus.TIMED_OUT}
    heir = MooncakeMaster(tmp_path / "heir.log", master.port)
    end_s = time.monotonic() + 60
    is_there = {PutStatus.STORED, PutStatus.PRESENT}  # a put that timed out may have arrived
    while not set(store.put(records, 5.0).results) <= is_there and time.monotonic() < end_s:
        time.sleep(0.2)
    assert statuses(store.get(buffers, TIMEOUT_S)) == {GetStatus.FOUND}
    assert all(buffer.data == record.data for buffer, record in zip(buffers, records, strict=True))
    assert put.quiet.wait(TIMEOUT_S) and get.quiet.wait(TIMEOUT_S)
    assert store.close(TIMEOUT_S)
    heir.kill()


def test_a_hanging_owner_holds_up_one_get_and_its_buffers_only(tmp_path):
    """The owner of the records stops; then it dies: only now are the get's buffers the caller's again."""
    master = MooncakeMaster(tmp_path / "master.log")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), master.endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    store = None
    try:
        assert process.stdout.readline() == b"ready\n"
        store = MooncakeStore(master.endpoint, LAYOUT, memory, OPTIONS)
        records, buffers = pages_in(memory, range(8))
        assert store.put(records, TIMEOUT_S).results == [PutStatus.STORED] * 8
        assert statuses(store.get(buffers, TIMEOUT_S)) == {GetStatus.FOUND}
        os.kill(process.pid, signal.SIGSTOP)
        hanging = store.get(buffers, 0.5)
        assert statuses(hanging) == {GetStatus.TIMED_OUT}
        assert not hanging.quiet.is_set()
        absent = [PageBuffer(key_of(99), memory[-LAYOUT.slot_bytes :])]
        assert statuses(store.get(absent, TIMEOUT_S)) == {GetStatus.MISSING}
        process.kill()
        assert hanging.quiet.wait(TIMEOUT_S)
        assert statuses(hanging) == {GetStatus.TIMED_OUT}
    finally:
        process.kill()
        process.communicate()
        if store is not None:
            store.close(TIMEOUT_S)
        master.kill()
