"""Small arenas and stores over them, for tests."""

import fcntl
import hashlib
import os

import numpy

from cache_service.arena_files import OwnedArena, arena_path
from cache_service.arena_format import ArenaSpec, bundle_checksum
from cache_service.host_memory import HostMemory
from cache_service.page_records import CommitStatus, Entry
from cache_service.page_store import PageStore

FINGERPRINT = b"layout of a test"
PLENTY = HostMemory(1 << 40, None, 1 << 40)


def spec(
    num_slots=8, bundle_bytes=256, num_ranks=1, cluster_id="test", num_readers=4, fingerprint=FINGERPRINT
):
    return ArenaSpec(cluster_id, fingerprint, bundle_bytes, num_ranks, num_slots, num_readers)


def open_arena(folder, wanted=None, safety=None, incarnation=1, prefault=True, memory=PLENTY):
    """Own an arena in `folder`; with all slots usable unless `prefault` is off."""
    wanted = wanted or spec()
    path = arena_path(wanted.cluster_id, "127.0.0.1", folder)
    owned = OwnedArena.open(path, wanted, incarnation, lambda folder: memory, safety)
    if prefault:
        owned.prefault.start()
        assert owned.prefault.wait(10) and owned.prefault.error is None
    return owned


def kill(owned):
    """Leave an arena as a killed server does: the file stays, its lock goes."""
    owned.arena.close()
    fcntl.flock(owned._descriptor, fcntl.LOCK_UN)
    os.close(owned._descriptor)


def key(name):
    return hashlib.sha256(str(name).encode()).digest()[:16]


def fill(arena, slot, page_key):
    """Write a page as all ranks would: words made of its key, and the checksums."""
    for rank in range(arena.spec.num_ranks):
        bundle = arena.bundle(slot, rank)
        numpy.frombuffer(bundle, numpy.uint8).reshape(-1, 16)[:] = numpy.frombuffer(page_key, numpy.uint8)
        arena.set_checksum(slot, rank, bundle_checksum(bundle, page_key, rank))


def store_chain(store, arena, names, parent=None, group=1, tenant=0):
    """Grant, fill and commit pages, each continuing the one before; return their keys."""
    keys = []
    for name in names:
        (grant,) = store.grant(group, 1)
        fill(arena, grant.slot, key(name))
        entry = Entry(grant.slot, grant.epoch, key(name), parent, 16, tenant)
        (result,) = store.commit(group, [entry])
        assert result.status is CommitStatus.COMMITTED, result
        keys.append(key(name))
        parent = key(name)
    return keys


def new_store(folder, safety=None, options=None, live_groups=(), **spec_fields):
    """A store over a fresh arena, and the list of its changes."""
    owned = open_arena(folder, spec(**spec_fields), safety)
    changes = []
    return owned, PageStore(owned.arena, changes, options, live_groups), changes
