"""What every RemoteStore must do beside keeping pages. A test module subclasses the contract."""

import struct
import threading
import time
from dataclasses import replace
from typing import Protocol

import pytest

from cache_service.remote import (
    RECORD_FORMAT_VERSION,
    RECORD_HEADER_BYTES,
    GetStatus,
    PutStatus,
    RecordLayout,
    RemoteStore,
    pack_header,
)
from tests.unit.page_contract import LAYOUT, TIMEOUT_S, PageContract


class StoreHarness(Protocol):
    """One backing store; all its pages may be thrown away between tests."""

    def open(self, layout: RecordLayout) -> RemoteStore:
        """See PageHarness."""

    def memory(self, num_bytes: int) -> memoryview:
        """See PageHarness."""

    def plant(self, name: str, record: bytes) -> None:
        """Put raw bytes where the record of this name belongs."""


class RemoteStoreContract(PageContract):
    """Subclasses give a fixture `harness`, a StoreHarness."""

    @pytest.mark.parametrize("part", ["version", "fingerprint"])
    def test_a_foreign_record_under_our_name_is_a_miss(self, harness, store, part):
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
    def test_a_corrupt_record_is_a_miss_and_makes_way(self, harness, store, damage):
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
        assert store.put([page], TIMEOUT_S).results == [PutStatus.STORED]
        assert store.get(buffers[:1], TIMEOUT_S).results[0].status is GetStatus.FOUND
        assert buffers[0].data == page.data

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
        assert store.close(TIMEOUT_S)
        assert time.monotonic() - began_s < TIMEOUT_S
