"""What everything that keeps pages must do: an arena, a peer's, a store, an arena over a store.

A test module subclasses the contract and gives it its harness.
"""

import hashlib
import itertools
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from cache_service.arena_format import bundle_checksum
from cache_service.keys import KVNamespace, PageKey, page_keys, salted
from cache_service.remote import (
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStore,
)

LAYOUT = RecordLayout(b"fingerprint 16 b", bundle_bytes=4_096, num_ranks=2)
TIMEOUT_S = 20.0
PAGE_SIZE = 16
NAMESPACE = KVNamespace("weights", "draft", "float32", PAGE_SIZE, "tp2")
TOKENS = list(range(1_000, 1_000 + 3 * PAGE_SIZE))


class PageHarness(Protocol):
    """Keeps pages; all of them may be thrown away between tests."""

    def open(self, layout: RecordLayout) -> RemoteStore:
        """Open it for a layout; what was opened before is no longer used, and its pages stay where that is
        what it is for."""

    def memory(self, num_bytes: int) -> memoryview:
        """Return memory that the one opened last may read and write."""

    def remove(self, keys: Sequence[PageKey]) -> None:
        """Take pages of LAYOUT away wherever they are, as evictions do. From any thread."""


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


def remove_records(folder: Path, keys: Sequence[PageKey]) -> None:
    """Remove a disk store's files behind its back."""
    for key in keys:
        (folder / f"{LAYOUT.name(key)}.page").unlink(missing_ok=True)


@cache
def keys_elsewhere(hash_seed: int) -> list[PageKey]:
    """The keys of TOKENS as another process computes them."""
    program = f"""
        from cache_service.keys import KVNamespace, page_keys
        namespace = KVNamespace(**{asdict(NAMESPACE)!r})
        print(*(key.hex() for key in page_keys(namespace.digest(), {TOKENS!r}, {PAGE_SIZE})))
    """
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [PageKey(bytes.fromhex(name)) for name in result.stdout.split()]


class PageContract:
    """Subclasses give a fixture `harness`, a PageHarness."""

    keeps_other_layouts: ClassVar[bool] = True
    """Pages of one layout are there still when those of another have been."""
    removes_under_readers: ClassVar[bool] = False
    """A page may be removed while it is read: the reader sees that by its checksum, a miss like any other."""

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
        assert set(ours.put(self.pages(harness, numbers), TIMEOUT_S).results) == {PutStatus.STORED}
        theirs = harness.open(other)
        results = theirs.get(self.buffers(harness, keys, other), TIMEOUT_S).results
        kept = GetStatus.FOUND if self.keeps_other_layouts else GetStatus.MISSING
        assert {result.status for result in results} == {kept}

    @pytest.mark.parametrize(
        "changes",
        [
            {"weights_digest": "another model's"},
            {"draft_digest": "another draft's"},
            {"dtype": "bfloat16"},
            {"tp_layout": "tp1"},
            {"layout_version": NAMESPACE.layout_version + 1},
            {"kv_settings": (("rope", "longer"),)},
            {"adapter": "one"},
            {"salt": b"a tenant's"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_the_same_tokens_of_another_model_setting_or_tenant_are_a_miss(self, harness, store, changes):
        keys = page_keys(NAMESPACE.digest(), TOKENS, PAGE_SIZE)
        pages = self.pages(harness, range(len(keys)))
        records = [record_of(key, page.data) for key, page in zip(keys, pages, strict=True)]
        assert store.put(records, TIMEOUT_S).results == [PutStatus.STORED] * len(keys)
        settings = {name: value for name, value in changes.items() if name != "salt"}
        theirs = salted(replace(NAMESPACE, **settings).digest(), changes.get("salt", b""))
        foreign = self.buffers(harness, page_keys(theirs, TOKENS, PAGE_SIZE))
        assert {result.status for result in store.get(foreign, TIMEOUT_S).results} == {GetStatus.MISSING}

    @pytest.mark.parametrize("hash_seed", [0, 4_321])
    def test_what_one_process_puts_another_finds_by_its_own_keys(self, harness, store, hash_seed):
        keys = page_keys(NAMESPACE.digest(), TOKENS, PAGE_SIZE)
        pages = self.pages(harness, range(len(keys)))
        store.put([record_of(key, page.data) for key, page in zip(keys, pages, strict=True)], TIMEOUT_S)
        buffers = self.buffers(harness, keys_elsewhere(hash_seed))
        results = store.get(buffers, TIMEOUT_S).results
        assert [result.status for result in results] == [GetStatus.FOUND] * len(keys)
        assert all(buffer.data == page.data for buffer, page in zip(buffers, pages, strict=True))

    def test_removed_pages_are_gone_and_can_be_put_again(self, harness, store):
        records = self.pages(harness, range(10))
        keys = [record.key for record in records]
        store.put(records[:5], TIMEOUT_S)
        harness.remove(keys[3:8])
        statuses = [result.status for result in store.get(self.buffers(harness, keys), TIMEOUT_S).results]
        assert statuses == [GetStatus.FOUND] * 3 + [GetStatus.MISSING] * 7
        assert store.put(records[3:4], TIMEOUT_S).results == [PutStatus.STORED]
        assert store.get(self.buffers(harness, keys[3:4]), TIMEOUT_S).results[0].status is GetStatus.FOUND

    def test_five_thousand_pages_go_in_one_call(self, harness):
        layout = replace(LAYOUT, bundle_bytes=256, num_ranks=1)
        store = harness.open(layout)
        records = self.pages(harness, range(5_000), layout)
        assert store.put(records, TIMEOUT_S).results == [PutStatus.STORED] * 5_000
        keys = [record.key for record in records]
        buffers = self.buffers(harness, keys, layout)
        results = store.get(buffers, TIMEOUT_S).results
        assert {result.status for result in results} == {GetStatus.FOUND}
        assert all(buffer.data == record.data for buffer, record in zip(buffers, records, strict=True))

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
        is_over, has_found = threading.Event(), threading.Event()
        legal_misses = {GetStatus.MISSING} | ({GetStatus.CORRUPT} if self.removes_under_readers else set())

        def write(records):
            for turn in itertools.count():
                if turn >= (num_rounds if has_found.is_set() else 100 * num_rounds):
                    return  # not before a reader has had its turn
                statuses = store.put(records, TIMEOUT_S).results
                stored.extend(statuses)
                if turn % 3 == 0:
                    harness.remove(keys[turn % num_keys :])

        def read(buffers):
            while not is_over.is_set():
                for result, buffer in zip(store.get(buffers, TIMEOUT_S).results, buffers, strict=True):
                    is_found = result.status is GetStatus.FOUND
                    found.append(is_found)
                    if is_found:
                        has_found.set()
                    if is_found and bytes(buffer.data) not in legal[buffer.key]:
                        faults.append(buffer.key)
                    if not is_found and result.status not in legal_misses:
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
