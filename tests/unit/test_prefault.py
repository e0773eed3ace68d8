"""Prefault: slots become usable in order, it ends when told to or when memory does, and fills page tables."""

import contextlib
import errno
import functools
import os
import platform
import threading
from pathlib import Path

import pytest

from cache_service.prefault import Prefault
from tests.unit.arenas import open_arena, spec

KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


@contextlib.contextmanager
def prefaulting(tmp_path, allocate):
    """An arena of 100 slots with none usable, and a prefault of ten slots a step."""
    owned = open_arena(tmp_path, spec(num_slots=100, bundle_bytes=4096), prefault=False)
    descriptor = os.open(owned.arena.path, os.O_RDWR)
    yield owned.arena, Prefault(descriptor, owned.arena, 10 * 4096, functools.partial(allocate, owned.arena))
    os.close(descriptor)
    owned.close()


def test_slots_become_usable_as_their_memory_comes(tmp_path):
    seen = []

    def allocate(arena, descriptor, start, count):
        seen.append((arena.num_usable_slots, (start - arena.bundle_offset(0, 0)) // 4096, count // 4096))

    with prefaulting(tmp_path, allocate) as (arena, prefault):
        prefault.start()
        assert prefault.wait(10)
        assert seen == [(done, done, 10) for done in range(0, 100, 10)]
        assert arena.num_usable_slots == 100


def _mapped_bytes(path):
    """Bytes of the file for which this process has page tables."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    rss = next(line for line in lines[start:] if line.startswith("Rss:"))
    return int(rss.split()[1]) * 1024


@pytest.mark.skipif(KERNEL < (5, 14), reason="before Linux 5.14 page tables cannot be filled ahead")
@pytest.mark.parametrize("is_adopted", [False, True])
def test_a_server_takes_no_faults_in_memory_that_it_has(tmp_path, is_adopted):
    wanted = spec(num_slots=100, bundle_bytes=1 << 16)
    owned = open_arena(tmp_path, wanted)
    if is_adopted:
        owned.close(keep=True)
        owned = open_arena(tmp_path, wanted, prefault=False)
        owned.prefault.start()
        assert owned.prefault.wait(10)
    data_bytes = wanted.num_slots * wanted.slot_bytes
    mapped_bytes = _mapped_bytes(owned.arena.path)
    owned.close()
    assert mapped_bytes >= data_bytes


def test_when_memory_runs_out_while_prefaulting_what_there_is_stays_usable(tmp_path):
    def allocate(arena, descriptor, start, count):
        if start >= arena.bundle_offset(30, 0):
            raise OSError(errno.ENOSPC, "No space left on device")

    with prefaulting(tmp_path, allocate) as (arena, prefault):
        prefault.start()
        assert prefault.wait(10)
        assert prefault.error.errno == errno.ENOSPC
        assert arena.num_usable_slots == 30


def test_a_stop_during_prefault_takes_one_step(tmp_path):
    entered, goes_on = threading.Event(), threading.Event()

    def allocate(arena, descriptor, start, count):
        entered.set()
        assert goes_on.wait(10)

    with prefaulting(tmp_path, allocate) as (arena, prefault):
        prefault.start()
        assert entered.wait(10)
        threading.Timer(0.05, goes_on.set).start()
        prefault.stop()
        assert arena.num_usable_slots == 10
        assert prefault.wait(0)
