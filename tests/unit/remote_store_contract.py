"""What every RemoteStore must do. A test module subclasses the contract and gives it its store."""

import hashlib
import random
import struct
import threading
import time
from dataclasses import replace
from typing import Protocol

import pytest

from cache_service.arena_format import bundle_checksum
from cache_service.keys import PageKey
from cache_service.remote import (
    RECORD_FORMAT_VERSION,
    RECORD_HEADER_BYTES,
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStore,
    pack_header,
)

LAYOUT = RecordLayout(b"fingerprint 16 b", bundle_bytes=4_096, num_ranks=2)
TIMEOUT_S = 20.0


class StoreHarness(Protocol):
    """One backing store; all its pages may be thrown away between tests."""

    def open(self, layout: RecordLayout) -> RemoteStore:
        """Open the store for a layout; the one opened before is no longer used, its pages stay."""

    def memory(self, num_bytes: int) -> memoryview:
        """Return memory that the store opened last may read and write."""

    def plant(self, name: str, record: bytes) -> None:
        """Put raw bytes where the record of this name belongs."""


def key_of(number: int) -> PageKey:
    return PageKey(hashlib.sha256(b"page %d" % number).digest()[:16])


def fill(data: memoryview, seed: int) -> None:
    data[:] = random.Random(seed).randbytes(data.nbytes)


def record_of(key: PageKey, data: memoryview, layout: RecordLayout = LAYOUT, length: int = 64) -> PageRecord:
    checksums = tuple(
        bundle_checksum(data[rank * layout.bundle_bytes : (rank + 1) * layout.bundle_bytes], key, rank)
        for rank in range(layout.num_ranks)
    )
    return PageRecord(key, length, checksums, data)


class RemoteStoreContract:
    """Subclasses give a fixture `harness`, a StoreHarness."""

    @pytest.fixture
    def store(self, harness):
        return harness.open(LAYOUT)

    def pages(self, harness, numbers, layout=LAYOUT):
        """Return records for pages of these numbers; the bytes follow from the number."""
        memory = harness.memory(len(numbers) * layout.slot_bytes)
        records = []
        for place, number in enumerate(numbers):
            data = memory[place * layout.slot_bytes : (place + 1) * layout.slot_bytes]
            fill(data, number)
            records.append(record_of(key_of(number), data, layout, length=number % 64 + 1))
        return records

    def buffers(self, harness, keys, layout=LAYOUT):
        memory = harness.memory(len(keys) * layout.slot_bytes)
        return [
            PageBuffer(key, memory[place * layout.slot_bytes : (place + 1) * layout.slot_bytes])
            for place, key in enumerate(keys)
        ]

    def test_what_was_put_is_got(self, harness, store):
        records = self.pages(harness, range(20))
        batch = store.put(records, TIMEOUT_S)
        assert batch.results == [PutStatus.STORED] * 20
        assert batch.quiet.is_set()
        buffers = self.buffers(harness, [record.key for record in reversed(records)])
        for result, buffer, record in zip(
            store.get(buffers, TIMEOUT_S).results, buffers, reversed(records), strict=True
        ):
            assert result.status is GetStatus.FOUND
            assert (result.length, result.checksums) == (record.length, record.checksums)
            assert buffer.data == record.data
        assert store.stats.puts == {PutStatus.STORED: 20}
        assert store.stats.gets == {GetStatus.FOUND: 20}
        assert store.stats.put_bytes == store.stats.got_bytes == 20 * LAYOUT.slot_bytes

    def test_one_batch_holds_hits_and_misses_in_order(self, harness, store):
        records = self.pages(harness, range(0, 40, 3))
        store.put(records, TIMEOUT_S)
        buffers = self.buffers(harness, [key_of(number) for number in range(40)])
        results = store.get(buffers, TIMEOUT_S).results
        for number, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
            if number % 3:
                assert result.status is GetStatus.MISSING
            else:
                assert result.status is GetStatus.FOUND
                assert buffer.data == records[number // 3].data
        assert store.get([], TIMEOUT_S).results == []
        assert store.put([], TIMEOUT_S).results == []

    def test_first_writer_wins(self, harness, store):
        (first,) = self.pages(harness, [1])
        (other,) = self.pages(harness, [2])
        second = record_of(first.key, other.data)
        assert store.put([first], TIMEOUT_S).results == [PutStatus.STORED]
        (fresh,) = self.pages(harness, [3])
        assert store.put([second, fresh], TIMEOUT_S).results == [PutStatus.PRESENT, PutStatus.STORED]
        (buffer,) = self.buffers(harness, [first.key])
        assert store.get([buffer], TIMEOUT_S).results[0].checksums == first.checksums
        assert buffer.data == first.data

    @pytest.mark.parametrize(
        "other",
        [
            replace(LAYOUT, fingerprint=b"another model's!"),
            replace(LAYOUT, bundle_bytes=8_192, num_ranks=1),
            replace(LAYOUT, num_ranks=3),
            replace(LAYOUT, bundle_bytes=2_048),
        ],
        ids=["fingerprint", "tp", "ranks", "bundle_bytes"],
    )
    def test_another_layout_is_a_miss_and_no_obstacle(self, harness, other):
        numbers = range(100, 104)
        theirs = harness.open(other)
        assert set(theirs.put(self.pages(harness, numbers, other), TIMEOUT_S).results) == {PutStatus.STORED}
        ours = harness.open(LAYOUT)
        keys = [key_of(number) for number in numbers]
        results = ours.get(self.buffers(harness, keys), TIMEOUT_S).results
        assert {result.status for result in results} == {GetStatus.MISSING}
        assert ours.exists(keys, TIMEOUT_S) == [False] * 4
        assert set(ours.put(self.pages(harness, numbers), TIMEOUT_S).results) == {PutStatus.STORED}
        theirs = harness.open(other)
        results = theirs.get(self.buffers(harness, keys, other), TIMEOUT_S).results
        assert {result.status for result in results} == {GetStatus.FOUND}

    @pytest.mark.parametrize("part", ["version", "fingerprint"])
    def test_a_foreign_record_under_our_name_is_a_counted_miss(self, harness, store, part):
        (page,) = self.pages(harness, [5])
        if part == "version":  # a made-up future format: only magic and version are where they were
            header = bytearray(pack_header(LAYOUT, page))
            struct.pack_into("<I", header, 8, RECORD_FORMAT_VERSION + 1)
            header[12:] = b"?" * (RECORD_HEADER_BYTES - 12)
        else:
            header = pack_header(replace(LAYOUT, fingerprint=b"another model's!"), page)
        harness.plant(LAYOUT.name(page.key), bytes(header) + bytes(page.data))
        (buffer,) = self.buffers(harness, [page.key])
        assert store.get([buffer], TIMEOUT_S).results[0].status is GetStatus.FOREIGN
        assert store.stats.gets == {GetStatus.FOREIGN: 1}

    @pytest.mark.parametrize(
        "damage",
        [
            "magic",
            "length",
            "checksum",
            "other_key",
            "first_byte",
            "last_byte",
            "ranks_swapped",
            "cut",
            "empty",
        ],
    )
    def test_a_corrupt_record_is_a_counted_miss_and_makes_way(self, harness, store, damage):
        page, other = self.pages(harness, [6, 7])
        record = bytearray(pack_header(LAYOUT, page) + bytes(page.data))
        bundle = LAYOUT.bundle_bytes
        if damage == "other_key":
            record[:] = pack_header(LAYOUT, other) + bytes(other.data)
        elif damage == "ranks_swapped":
            first = bytes(page.data[:bundle])
            record[RECORD_HEADER_BYTES:] = bytes(page.data[bundle:]) + first
        elif damage == "cut":
            del record[-100:]
        elif damage == "empty":
            del record[1:]
        else:
            places = {"magic": 0, "length": 56, "checksum": 64, "first_byte": RECORD_HEADER_BYTES}
            record[places.get(damage, -1)] ^= 0x10
        harness.plant(LAYOUT.name(page.key), bytes(record))
        buffers = self.buffers(harness, [page.key, other.key])
        assert store.put([other], TIMEOUT_S).results == [PutStatus.STORED]
        results = store.get(buffers, TIMEOUT_S).results
        assert [result.status for result in results] == [GetStatus.CORRUPT, GetStatus.FOUND]
        assert store.stats.gets == {GetStatus.CORRUPT: 1, GetStatus.FOUND: 1}
        assert store.put([page], TIMEOUT_S).results == [PutStatus.STORED]
        assert store.get(buffers[:1], TIMEOUT_S).results[0].status is GetStatus.FOUND
        assert buffers[0].data == page.data

    def test_removed_pages_are_gone_and_can_be_put_again(self, harness, store):
        records = self.pages(harness, range(10))
        keys = [record.key for record in records]
        store.put(records[:5], TIMEOUT_S)
        assert store.exists(keys, TIMEOUT_S) == [True] * 5 + [False] * 5
        assert store.remove(keys[3:8], TIMEOUT_S) == 2
        assert store.exists(keys, TIMEOUT_S) == [True] * 3 + [False] * 7
        assert store.put(records[3:4], TIMEOUT_S).results == [PutStatus.STORED]
        assert store.get(self.buffers(harness, keys[3:4]), TIMEOUT_S).results[0].status is GetStatus.FOUND

    def test_five_thousand_pages_go_in_one_call(self, harness):
        layout = replace(LAYOUT, bundle_bytes=256, num_ranks=1)
        store = harness.open(layout)
        records = self.pages(harness, range(5_000), layout)
        assert store.put(records, TIMEOUT_S).results == [PutStatus.STORED] * 5_000
        keys = [record.key for record in records]
        assert store.exists(keys, TIMEOUT_S) == [True] * 5_000
        buffers = self.buffers(harness, keys, layout)
        results = store.get(buffers, TIMEOUT_S).results
        assert {result.status for result in results} == {GetStatus.FOUND}
        assert all(buffer.data == record.data for buffer, record in zip(buffers, records, strict=True))
        assert store.remove(keys, TIMEOUT_S) == 5_000

    def test_no_read_is_torn_under_three_writers_and_two_readers(self, harness, store):
        """Writers race for the same keys with bytes of their own, while pages are removed again."""
        num_keys, num_rounds = 6, 30
        keys = [key_of(number) for number in range(num_keys)]
        writes = []
        for writer in range(3):
            pages = self.pages(harness, range(1_000 * writer, 1_000 * writer + num_keys))
            writes.append([record_of(key, page.data) for key, page in zip(keys, pages, strict=True)])
        reads = [self.buffers(harness, keys) for _ in range(2)]
        legal = {key: {bytes(records[place].data) for records in writes} for place, key in enumerate(keys)}
        stored: list[PutStatus] = []
        found: list[bool] = []
        faults: list[object] = []
        is_over = threading.Event()

        def write(records):
            for turn in range(num_rounds):
                statuses = store.put(records, TIMEOUT_S).results
                stored.extend(statuses)
                if turn % 3 == 0:
                    store.remove(keys[turn % num_keys :], TIMEOUT_S)

        def read(buffers):
            while not is_over.is_set():
                for result, buffer in zip(store.get(buffers, TIMEOUT_S).results, buffers, strict=True):
                    is_found = result.status is GetStatus.FOUND
                    found.append(is_found)
                    if is_found and bytes(buffer.data) not in legal[buffer.key]:
                        faults.append(buffer.key)
                    if result.status not in (GetStatus.FOUND, GetStatus.MISSING):
                        faults.append(result)

        writers = [threading.Thread(target=write, args=(records,)) for records in writes]
        readers = [threading.Thread(target=read, args=(buffers,)) for buffers in reads]
        for thread in writers + readers:
            thread.start()
        for thread in writers:
            thread.join(60)
        is_over.set()
        for thread in readers:
            thread.join(60)
        assert not faults, faults[:5]
        assert any(found)
        assert stored.count(PutStatus.STORED) > num_keys
        assert set(stored) <= {PutStatus.STORED, PutStatus.PRESENT}

    def test_a_deadline_is_kept_and_the_buffers_come_back(self, harness, store):
        records = self.pages(harness, range(300))
        began_s = time.monotonic()
        put = store.put(records, 1e-4)
        assert time.monotonic() - began_s < 1.0
        assert PutStatus.TIMED_OUT in put.results
        assert put.quiet.wait(TIMEOUT_S)
        store.put(records, TIMEOUT_S)
        buffers = self.buffers(harness, [record.key for record in records])
        get = store.get(buffers, 1e-4)
        assert get.quiet.wait(TIMEOUT_S)
        for result, buffer, record in zip(get.results, buffers, records, strict=True):
            assert result.status in (GetStatus.FOUND, GetStatus.TIMED_OUT)
            assert result.status is GetStatus.TIMED_OUT or buffer.data == record.data
        assert any(result.status is GetStatus.TIMED_OUT for result in get.results)

    def test_a_closed_store_answers_at_once_and_calls_under_way_end(self, harness, store):
        records = self.pages(harness, range(300))
        batches = []
        thread = threading.Thread(target=lambda: batches.append(store.put(records, TIMEOUT_S)))
        thread.start()
        began_s = time.monotonic()
        assert store.close(TIMEOUT_S)
        thread.join(TIMEOUT_S)
        assert set(batches[0].results) <= {PutStatus.STORED, PutStatus.FAILED}
        assert batches[0].quiet.is_set()
        keys = [record.key for record in records]
        statuses = {result.status for result in store.get(self.buffers(harness, keys), TIMEOUT_S).results}
        assert statuses == {GetStatus.FAILED}
        assert store.put(records, TIMEOUT_S).results == [PutStatus.FAILED] * 300
        assert store.exists(keys, TIMEOUT_S) == [False] * 300
        assert store.close(TIMEOUT_S)
        assert time.monotonic() - began_s < TIMEOUT_S
