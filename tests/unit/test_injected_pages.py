"""An injected wire and an injected store fail as their seed says, and keep what they promise all the same."""

import time

import pytest

from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.injected_pages import InjectedStore, InjectedTransfer, PageInjection
from cache_service.remote import GetStatus, PageBuffer, PutStatus
from cache_service.transfer import ReadStatus, RemoteRun
from tests.unit.fake_store import FakeStore
from tests.unit.page_contract import LAYOUT, TIMEOUT_S, key_of, record_of
from tests.unit.transfer_contract import TransferContract

RUN_BYTES = 64
NUM_RUNS = 200
CALLS = 40


class InjectedHarness:
    def __init__(self, injection):
        self.injection = injection
        self.network = InProcessNetwork()
        self.ends = []

    def open(self):
        inner = InProcessTransfer(self.network, f"node-{len(self.ends)}")
        self.ends.append(InjectedTransfer(inner, self.injection))
        return self.ends[-1]


@pytest.fixture
def harness():
    harness = InjectedHarness(PageInjection(1, max_delay_s=0.002))
    yield harness
    for transfer in harness.ends:
        assert transfer.close(TIMEOUT_S)


class TestInjectedTransfer(TransferContract):
    """Where it only delays it is a Transfer like any other."""


def read_over(injection):
    """Read one segment's bytes; return what was there, the batch and the buffer."""
    network = InProcessNetwork()
    here = InjectedTransfer(InProcessTransfer(network, "here"), injection)
    there = InProcessTransfer(network, "there")
    memory = memoryview(bytearray(range(RUN_BYTES)) * NUM_RUNS)
    buffer = memoryview(bytearray(memory.nbytes))
    address = there.register(memory)
    here.register(buffer)
    runs = [
        RemoteRun(address + start, buffer[start : start + RUN_BYTES])
        for start in range(0, memory.nbytes, RUN_BYTES)
    ]
    batch = here.read("there", runs, TIMEOUT_S)
    return memory, batch, buffer, (here, there)


def close(ends):
    for end in ends:
        assert end.close(TIMEOUT_S)


def test_some_runs_fail_and_some_lose_a_bit():
    memory, batch, buffer, ends = read_over(PageInjection(1, failure_ratio=0.2, corruption_ratio=0.3))
    num_failed = batch.results.count(ReadStatus.FAILED)
    num_wrong = sum(
        buffer[start : start + RUN_BYTES] != memory[start : start + RUN_BYTES]
        for start in range(0, memory.nbytes, RUN_BYTES)
    )
    assert batch.quiet.is_set()
    assert num_failed == pytest.approx(0.2 * NUM_RUNS, rel=0.5)
    assert num_wrong == pytest.approx(0.3 * NUM_RUNS, rel=0.5)
    close(ends)


def test_a_late_call_fails_and_writes_until_it_is_quiet():
    memory, batch, buffer, ends = read_over(PageInjection(1, late_ratio=1.0, max_late_s=0.2))
    assert set(batch.results) == {ReadStatus.FAILED}
    assert batch.quiet.wait(TIMEOUT_S)
    at_rest = bytes(buffer)
    assert at_rest != bytes(memory)
    time.sleep(0.02)
    assert bytes(buffer) == at_rest
    close(ends)


def test_the_close_of_a_late_call_makes_it_quiet():
    _, batch, _, ends = read_over(PageInjection(1, late_ratio=1.0, max_late_s=60.0))
    close(ends)
    assert batch.quiet.is_set()


def put_and_get(injection):
    """Put and get pages one by one; return the store and what came of it."""
    inner = FakeStore(LAYOUT)
    store = InjectedStore(inner, injection)
    records = [record_of(key_of(name), memoryview(bytearray(LAYOUT.slot_bytes))) for name in range(CALLS)]
    puts = [store.put([record], TIMEOUT_S).results[0] for record in records]
    gets = []
    for record in records:
        data = memoryview(bytearray(LAYOUT.slot_bytes))
        batch = store.get([PageBuffer(record.key, data)], TIMEOUT_S)
        gets.append((batch.results[0].status, batch.quiet.wait(TIMEOUT_S), data == record.data))
    assert store.close(TIMEOUT_S) and inner.is_closed
    return inner, puts, gets


def test_a_store_without_faults_is_as_it_was():
    inner, puts, gets = put_and_get(PageInjection(1))
    assert puts == [PutStatus.STORED] * CALLS and gets == [(GetStatus.FOUND, True, True)] * CALLS
    assert len(inner.records) == CALLS


def test_some_puts_fail_and_are_counted():
    inner, puts, _ = put_and_get(PageInjection(1, failure_ratio=0.3))
    assert 0 < puts.count(PutStatus.FAILED) < CALLS
    assert inner.stats.failures["put: injected"] == puts.count(PutStatus.FAILED)
    assert puts.count(PutStatus.STORED) == len(inner.records)


def test_what_lost_a_bit_on_its_way_into_the_store_is_corrupt_there():
    _, puts, gets = put_and_get(PageInjection(1, corruption_ratio=0.3))
    statuses = [status for status, _, _ in gets]
    assert puts == [PutStatus.STORED] * CALLS
    assert 0 < statuses.count(GetStatus.CORRUPT) < CALLS
    assert all(is_right for status, _, is_right in gets if status is GetStatus.FOUND)


def test_late_gets_fail_and_come_to_rest():
    _, _, gets = put_and_get(PageInjection(1, late_ratio=0.5, max_late_s=0.01))
    late = [is_quiet for status, is_quiet, _ in gets if status is GetStatus.FAILED]
    assert 0 < len(late) < CALLS and all(late)
