"""The contract over Mooncake's engine on the loopback, and what it leaves behind when a peer hangs."""

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cache_service.transfer import ReadStatus, RemoteRun
from tests.unit.mooncake_master import has_mooncake
from tests.unit.transfer_contract import TIMEOUT_S, TransferContract

if not has_mooncake():
    pytest.skip("Mooncake cannot be imported: no wheel or no libibverbs1", allow_module_level=True)

from cache_service.mooncake_library import MooncakeOptions
from cache_service.mooncake_transfer import MAX_PART_BYTES, MooncakeTransfer, _Pace, _parts

pytestmark = pytest.mark.slow  # a master, hung peers and own deadlines: mostly waiting

OPTIONS = MooncakeOptions("127.0.0.1")
OWNER = """
    import mmap, sys
    from tests.unit.test_mooncake_transfer import OPTIONS, MooncakeTransfer
    transfer = MooncakeTransfer(OPTIONS)
    memory = memoryview(mmap.mmap(-1, 64 << 20))
    memory[:] = b"7" * memory.nbytes
    print(transfer.segment, transfer.register(memory), flush=True)
    sys.stdin.read()
"""


class MooncakeHarness:
    def __init__(self):
        self.ends = []

    def open(self):
        self.ends.append(MooncakeTransfer(OPTIONS))
        return self.ends[-1]


@pytest.fixture
def harness():
    harness = MooncakeHarness()
    yield harness
    for transfer in harness.ends:
        assert transfer.close(TIMEOUT_S)


class TestMooncakeTransfer(TransferContract):
    pass


def test_requests_are_split_by_descriptors_and_by_bytes():
    page = memoryview(bytearray(1 << 20))
    small, large = RemoteRun(0, page[:4_096]), RemoteRun(0, page)
    assert list(_parts([])) == []
    assert list(_parts([small] * 600)) == [(0, 256), (256, 512), (512, 600)]
    assert [end - start for start, end in _parts([large] * 130)] == [64, 64, 2]
    assert 64 * page.nbytes == MAX_PART_BYTES


def test_a_read_sleeps_for_most_of_its_time_once_that_is_known():
    pace, size = _Pace(), 32 << 20
    assert pace.rest_s(size) == 0.0
    pace.note(size, 0.02)
    assert pace.rest_s(size) == pytest.approx(0.016)
    assert pace.rest_s(2 * size) == pytest.approx(0.032)
    assert pace.rest_s(1 << 20) == 0.0, "it ends before a sleep pays"
    pace.note(1 << 20, 1.0)
    assert pace.rest_s(size) == pytest.approx(0.016), "of which nothing is learnt either"
    pace.note(size, 0.016)
    assert pace.rest_s(size) == pytest.approx(0.0128), "at once"
    pace.note(size, 1.0)
    assert pace.rest_s(size) < 0.026, "by and by"
    for _ in range(20):
        pace.note(size, 100.0)
    assert pace.rest_s(size) == 1.0


def test_buffers_of_a_read_from_a_hanging_peer_are_written_no_more_once_quiet(harness):
    """Mooncake itself writes them when the peer goes on, long after the read has failed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    try:
        segment, address = process.stdout.readline().split()
        transfer = harness.open()
        memory = memoryview(mmap.mmap(-1, 48 << 20))
        transfer.register(memory)
        page = 1 << 20
        runs = [
            RemoteRun(int(address) + start, memory[start : start + page])
            for start in range(0, memory.nbytes, page)
        ]
        assert transfer.read(segment, runs[:1], TIMEOUT_S).results == [ReadStatus.READ]
        os.kill(process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        batch = transfer.read(segment, runs, 0.3)
        assert time.monotonic() - began_s < 2.0
        assert set(batch.results) == {ReadStatus.TIMED_OUT}
        assert not batch.quiet.is_set()
        healthy = harness.open()
        data = memoryview(mmap.mmap(-1, page))
        data[:] = b"5" * page
        run = RemoteRun(healthy.register(data), memory[:page])
        assert transfer.read(healthy.segment, [run], TIMEOUT_S).results == [ReadStatus.READ]
        assert batch.quiet.wait(TIMEOUT_S)
        memory[:] = b"9" * memory.nbytes
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert memory == b"9" * memory.nbytes
        assert transfer.read(segment, runs, TIMEOUT_S).results == [ReadStatus.READ] * len(runs)
        assert memory == b"7" * memory.nbytes
    finally:
        process.kill()
        process.communicate()
