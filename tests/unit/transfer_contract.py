"""What every Transfer must do. A test module subclasses the contract and gives it two ends of its wire."""

import mmap
import random
import threading
import time
from typing import Protocol

import pytest

from cache_service.transfer import ReadStatus, RemoteRun, Transfer

TIMEOUT_S = 20.0
PAGE_BYTES = 4_096
NUM_PAGES = 5_000


class TransferHarness(Protocol):
    """Opens ends of the wire, as many as wanted, and closes them after the test."""

    def open(self) -> Transfer: ...


class TransferContract:
    """Subclasses give a fixture `harness`, a TransferHarness."""

    @pytest.fixture
    def owner(self, harness):
        """An end whose memory is read, its bytes and the address of the first."""
        transfer = harness.open()
        memory = memoryview(mmap.mmap(-1, NUM_PAGES * PAGE_BYTES))
        memory[:] = random.Random(1).randbytes(memory.nbytes)
        return transfer, memory, transfer.register(memory)

    @pytest.fixture
    def reader(self, harness):
        transfer = harness.open()
        memory = memoryview(mmap.mmap(-1, NUM_PAGES * PAGE_BYTES))
        transfer.register(memory)
        return transfer, memory

    def run_of(self, memory, place, address, num_bytes=PAGE_BYTES):
        return RemoteRun(address, memory[place * PAGE_BYTES : place * PAGE_BYTES + num_bytes])

    def test_bytes_are_read_from_where_they_lie(self, owner, reader):
        (transfer, memory), (other, source, address) = reader, owner
        places = [7, 3, 4_000, 0, 1]
        runs = [
            self.run_of(memory, place, address + source_place * PAGE_BYTES)
            for place, source_place in enumerate(places)
        ]
        batch = transfer.read(other.segment, runs, TIMEOUT_S)
        assert batch.results == [ReadStatus.READ] * 5
        assert batch.quiet.is_set()
        for run, place in zip(runs, places, strict=True):
            assert run.into == source[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
        assert memory[5 * PAGE_BYTES : 6 * PAGE_BYTES] == bytes(PAGE_BYTES)
        assert transfer.read(other.segment, [], TIMEOUT_S).results == []

    def test_five_thousand_runs_go_in_one_call(self, owner, reader):
        (transfer, memory), (other, source, address) = reader, owner
        runs = [self.run_of(memory, place, address + place * PAGE_BYTES) for place in range(NUM_PAGES)]
        assert transfer.read(other.segment, runs, TIMEOUT_S).results == [ReadStatus.READ] * NUM_PAGES
        assert memory == source

    def test_both_ends_read_each_other_at_once(self, harness):
        ends = []
        for seed in range(2):
            transfer = harness.open()
            memory = memoryview(mmap.mmap(-1, 400 * PAGE_BYTES))
            memory[: 200 * PAGE_BYTES] = random.Random(seed).randbytes(200 * PAGE_BYTES)
            ends.append((transfer, memory, transfer.register(memory)))
        results = []

        def read(mine, theirs):
            (transfer, memory, _), (other, _, address) = mine, theirs
            for _ in range(5):
                runs = [
                    self.run_of(memory, 200 + place, address + place * PAGE_BYTES) for place in range(200)
                ]
                results.extend(transfer.read(other.segment, runs, TIMEOUT_S).results)

        threads = [threading.Thread(target=read, args=pair) for pair in (ends, reversed(ends))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [ReadStatus.READ] * 2_000
        half = 200 * PAGE_BYTES
        assert ends[0][1][half:] == ends[1][1][:half]
        assert ends[1][1][half:] == ends[0][1][:half]

    def test_memory_that_is_not_registered_is_not_read(self, owner, reader):
        (transfer, memory), (other, source, address) = reader, owner
        beyond = [
            self.run_of(memory, 0, address + source.nbytes),
            self.run_of(memory, 1, address + source.nbytes - 8),
        ]
        for run in beyond:
            batch = transfer.read(other.segment, [run], TIMEOUT_S)
            assert batch.results == [ReadStatus.FAILED]
            assert batch.quiet.wait(TIMEOUT_S)
        assert transfer.read(other.segment, [self.run_of(memory, 0, address)], TIMEOUT_S).results == [
            ReadStatus.READ
        ]

    def test_a_segment_that_nobody_has_is_a_failure(self, reader, owner):
        (transfer, memory), (other, _, address) = reader, owner
        batch = transfer.read("127.0.0.1:9", [self.run_of(memory, 0, address)], TIMEOUT_S)
        assert batch.results == [ReadStatus.FAILED]
        assert batch.quiet.wait(TIMEOUT_S)
        assert transfer.read(other.segment, [self.run_of(memory, 0, address)], TIMEOUT_S).results == [
            ReadStatus.READ
        ]

    def test_an_owner_that_has_gone_is_a_failure_in_time(self, harness, owner, reader):
        (transfer, memory), (other, _, address) = reader, owner
        run = self.run_of(memory, 0, address)
        assert transfer.read(other.segment, [run], TIMEOUT_S).results == [ReadStatus.READ]
        segment = other.segment
        assert other.close(TIMEOUT_S)
        began_s = time.monotonic()
        batch = transfer.read(segment, [run], TIMEOUT_S)
        assert batch.results == [ReadStatus.FAILED]
        assert time.monotonic() - began_s < TIMEOUT_S
        assert batch.quiet.wait(TIMEOUT_S)
        transfer.forget(segment)
        heir = harness.open()
        data = memoryview(mmap.mmap(-1, PAGE_BYTES))
        data[:] = b"h" * PAGE_BYTES
        run = self.run_of(memory, 0, heir.register(data))
        assert transfer.read(heir.segment, [run], TIMEOUT_S).results == [ReadStatus.READ]
        assert run.into == data

    def test_a_deadline_is_kept_and_the_buffers_come_back(self, owner, reader):
        (transfer, memory), (other, _, address) = reader, owner
        runs = [self.run_of(memory, place, address + place * PAGE_BYTES) for place in range(NUM_PAGES)]
        batch = transfer.read(other.segment, runs, 1e-4)
        assert ReadStatus.TIMED_OUT in batch.results
        assert batch.quiet.wait(TIMEOUT_S)
        memory[:] = bytes(memory.nbytes)
        assert transfer.read(other.segment, runs[:1], TIMEOUT_S).results == [ReadStatus.READ]
        assert memory[PAGE_BYTES:] == bytes(memory.nbytes - PAGE_BYTES)

    def test_a_closed_end_answers_at_once(self, owner, reader):
        (transfer, memory), (other, _, address) = reader, owner
        assert transfer.close(TIMEOUT_S)
        batch = transfer.read(other.segment, [self.run_of(memory, 0, address)], TIMEOUT_S)
        assert batch.results == [ReadStatus.FAILED]
        assert batch.quiet.is_set()
        assert transfer.close(TIMEOUT_S)
