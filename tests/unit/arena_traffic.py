"""Writers and readers of one arena, each its own process, and the loop of the server that they talk to.

Run as a program: ROLE ARENA_PATH SPEC... over stdin and stdout, one JSON line a message.
"""

import json
import random
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy

from cache_service.arena import Arena
from cache_service.arena_format import ArenaSpec, SlotState
from cache_service.arena_safety import ArenaSafety
from cache_service.lease_row import LeaseRow
from cache_service.page_records import CommitStatus, Entry, Grant, Location
from cache_service.page_store import PageStore

NUM_WRITERS, NUM_READERS = 3, 2


def fill(arena, slot, page_key):
    """Write a page whose every 16 bytes are its key, as slowly as numpy does it."""
    rows = numpy.frombuffer(arena.bundle(slot, 0), numpy.uint8).reshape(-1, 16)
    rows[:] = numpy.frombuffer(page_key, numpy.uint8)
    arena.set_checksum(slot, 0, 1)


def write(arena, group):
    """Take grants, write pages under random names of a few, commit; until stdin ends."""
    chance = random.Random(group)
    for line in sys.stdin:
        entries = []
        for slot, epoch in json.loads(line):
            page_key = chance.randrange(1, 40).to_bytes(16, "big")
            fill(arena, slot, page_key)
            entries.append([slot, epoch, page_key.hex()])
        print(json.dumps(entries), flush=True)


def read(arena, row, seconds):
    """Read what the headers show, under leases; report pages read, torn ones and those found changed."""
    lease_row, chance, end = LeaseRow(arena, row), random.Random(row), time.monotonic() + seconds
    num_read = num_torn = num_changed = num_missed = 0
    copy = numpy.empty(arena.spec.bundle_bytes, numpy.uint8)
    while time.monotonic() < end:
        slot = chance.randrange(arena.spec.num_slots)
        location, page_key = Location(slot, arena.epoch(slot)), arena.key(slot)
        if arena.state(slot) is not SlotState.READY or arena.epoch(slot) != location.epoch:
            continue
        time.sleep(chance.random() / 1000)  # what was heard of a page may be old when it is used
        if lease_row.acquire([page_key], [location]) == 0:
            num_missed += 1
            continue
        half = len(copy) // 2
        source = numpy.frombuffer(arena.bundle(slot, 0), numpy.uint8)
        copy[:half] = source[:half]
        time.sleep(chance.random() / 1000)
        copy[half:] = source[half:]
        is_current = lease_row.is_current(location)
        lease_row.release([slot])
        num_read += 1
        num_changed += not is_current
        is_torn = (copy.reshape(-1, 16) != numpy.frombuffer(page_key, numpy.uint8)).any()
        num_torn += bool(is_current and is_torn)
    print(json.dumps([num_read, num_torn, num_changed, num_missed]))


def run(path, spec, safety, seconds):
    """Serve 3 writers and 2 readers over the arena at `path`; return the readers' sums by name."""
    arena = Arena.map(path, spec, safety)
    store = PageStore(arena, [])
    common = [json.dumps({**asdict(spec), "fingerprint": spec.fingerprint.hex()}), json.dumps(asdict(safety))]

    def start(role, number):
        command = [
            sys.executable,
            "-m",
            "tests.unit.arena_traffic",
            role,
            path,
            *common,
            str(number),
            str(seconds),
        ]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    writers = {
        popen.stdout: (popen, group)
        for group in range(1, NUM_WRITERS + 1)
        for popen in [start("write", group)]
    }
    readers = [start("read", row) for row in range(NUM_READERS)]
    for popen, group in writers.values():
        offer(popen, store.grant(group, 2))
    num_committed = 0
    while any(popen.poll() is None for popen in readers):
        for stdout in select.select(list(writers), [], [], 0.05)[0]:
            popen, group = writers[stdout]
            entries = [
                Entry(slot, epoch, bytes.fromhex(name), None, 16)
                for slot, epoch, name in json.loads(stdout.readline())
            ]
            results = store.commit(group, entries)
            num_committed += sum(result.status is CommitStatus.COMMITTED for result in results)
            offer(popen, store.grant(group, 2))
    store.check()
    sums = numpy.sum([json.loads(popen.communicate(timeout=10)[0]) for popen in readers], axis=0).tolist()
    for popen, _ in writers.values():
        popen.stdin.close()
        popen.wait(10)
        popen.stdout.close()
    arena.close()
    return dict(zip(("read", "torn", "changed", "missed"), sums, strict=True)) | {
        "committed": num_committed, "evicted": store.num_evicted, "refused": store.num_refused,
    }  # fmt: skip


def offer(popen, granted: list[Grant]):
    popen.stdin.write(json.dumps([[grant.slot, grant.epoch] for grant in granted]) + "\n")
    popen.stdin.flush()


def main(role, path, spec_text, safety_text, number, seconds):
    fields = json.loads(spec_text)
    spec = ArenaSpec(**{**fields, "fingerprint": bytes.fromhex(fields["fingerprint"])})
    arena = Arena.map(Path(path), spec, ArenaSafety(**json.loads(safety_text)))
    if role == "write":
        write(arena, int(number))
    else:
        read(arena, int(number), float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
