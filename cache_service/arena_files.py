"""The arena's file: its name, its one owner, adoption of what a killed server left, sweeping, clean removal.

Called by the CacheServer at its start and end. The owner holds a lock on the file, which the kernel drops
when the process dies; pid and start time in the header say who it is.
"""

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from cache_service import arena_format
from cache_service.arena import Arena
from cache_service.arena_format import ArenaIdentity, ArenaSpec
from cache_service.arena_safety import ArenaSafety
from cache_service.host_memory import HostMemory
from cache_service.prefault import Prefault
from cache_service.processes import ProcessId

logger = logging.getLogger(__name__)

ORPHAN_PATIENCE_S = 5.0
"""A killed server's lock goes with its memory, which takes the system a while."""
_RETRY_S = 0.05

SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _SUFFIX = "eyrie-", ".arena"
_WORD_BYTES = 8


class ArenaOwnedError(Exception):
    """Another live server owns the arena of this node and cluster."""


def arena_path(cluster_id: str, node_address: str, folder: Path = SHARED_MEMORY) -> Path:
    """Return where the arena of one node of one cluster lies."""
    node = re.sub(r"[^A-Za-z0-9.-]", "_", node_address)
    return folder / f"{_PREFIX}{cluster_id}-{node}{_SUFFIX}"


class OwnedArena:
    """The one server's hold on its node's arena: the mapped arena, the file's lock and the prefault."""

    def __init__(self, descriptor: int, arena: Arena, is_adopted: bool) -> None:
        self.arena = arena
        self.is_adopted = is_adopted
        """Whether pages of a former server are in it."""
        self.prefault = Prefault(descriptor, arena)
        self._descriptor = descriptor

    @classmethod
    def open(
        cls,
        path: Path,
        spec: ArenaSpec,
        first_incarnation: int,
        read_memory: Callable[[Path], HostMemory] = HostMemory.read,
        safety: ArenaSafety | None = None,
    ) -> "OwnedArena":
        """Take the arena at `path`: adopt an orphan of the same spec, wipe any other, create what misses.

        Its incarnation is above that of an adopted one and at least `first_incarnation`; a clock's
        nanoseconds keep it rising over files that are gone. Raises ArenaOwnedError while another server
        lives, ArenaSizeError where there is no room for it.
        """
        while True:
            descriptor = _locked(path)
            if descriptor is None:
                continue  # it was unlinked between opening and locking
            try:
                found = os.fstat(descriptor).st_size
                difference = _difference(descriptor, spec) if found else None
                if difference is not None:
                    logger.warning(
                        "wiped the arena that another server left",
                        extra={"path": str(path), "reason": difference},
                    )
                    path.unlink(missing_ok=True)
                    os.close(descriptor)
                    continue
                return cls._take(descriptor, path, spec, bool(found), first_incarnation, read_memory, safety)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise

    @classmethod
    def _take(
        cls,
        descriptor: int,
        path: Path,
        spec: ArenaSpec,
        is_adopted: bool,
        first_incarnation: int,
        read_memory: Callable[[Path], HostMemory],
        safety: ArenaSafety | None,
    ) -> "OwnedArena":
        try:
            allocated = os.fstat(descriptor).st_blocks * 512
            read_memory(path.parent).require(spec.file_bytes - allocated, path.parent)
            if not is_adopted:
                os.ftruncate(descriptor, spec.file_bytes)
                os.posix_fallocate(descriptor, 0, spec.data_offset)
            arena = Arena(descriptor, path, spec, safety)
        except BaseException:
            if not is_adopted:
                path.unlink(missing_ok=True)
            raise
        former = arena.incarnation if is_adopted else 0
        owner = ProcessId.current()
        arena.set_word(arena_format.OWNER_PID_WORD, owner.pid)
        arena.set_word(arena_format.OWNER_START_WORD, owner.start_ticks)
        arena.set_word(arena_format.KEPT_WORD, 0)
        arena.set_word(arena_format.INCARNATION_WORD, max(first_incarnation, former + 1))
        if not is_adopted:
            # Last of all: a file without it is no arena to whoever finds it.
            os.pwrite(descriptor, spec.pack(), 0)
        return cls(descriptor, arena, is_adopted)

    def close(self, keep: bool = False) -> None:
        """Let go of the arena: remove its file, or with `keep` leave it to the next server. Idempotent."""
        if self._descriptor < 0:
            return
        self.prefault.stop()
        if keep:
            self.arena.set_word(arena_format.KEPT_WORD, 1)
        else:
            self.arena.path.unlink(missing_ok=True)
        self.arena.close()
        # After the unlink, so that nobody adopts a file that goes; by name, for a mapping that some view
        # keeps has a copy of the descriptor.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = -1


def settle_orphan(path: Path, *, keep: bool, patience_s: float = ORPHAN_PATIENCE_S) -> bool:
    """Do what a killed server could not: remove its arena, or with `keep` mark it as left on purpose.

    Return whether there was one; what a server that ended well has kept is none. `patience_s` is how long its
    owner may take to be gone.
    """
    end_s = time.monotonic() + patience_s
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        while not _is_locked(descriptor):
            if time.monotonic() >= end_s:
                logger.warning("an arena's owner lives: its file stays", extra={"path": str(path)})
                return False
            time.sleep(_RETRY_S)
        if not _is_at(path, descriptor):  # a new server has replaced it
            return False
        if keep:
            if header_word(os.pread(descriptor, arena_format.HEADER_BYTES, 0), arena_format.KEPT_WORD):
                return False
            os.pwrite(descriptor, (1).to_bytes(_WORD_BYTES, "little"), arena_format.KEPT_WORD * _WORD_BYTES)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True


def sweep_dead_clusters(cluster_id: str, folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove arenas that clusters left whose processes are all dead; return their paths.

    Left alone: files with a live owner or a live reader, files of our own cluster (other nodes of it may
    share this folder), files kept on purpose, files of other users and those of other format versions.
    """
    swept = []
    for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor) and _is_swept(descriptor, cluster_id):
                    path.unlink(missing_ok=True)
                    logger.warning("removed the arena of a dead cluster", extra={"path": str(path)})
                    swept.append(path)
        finally:
            os.close(descriptor)
    return swept


def header_word(header: bytes, index: int) -> int:
    """Return a word of an arena's header, or of a reader row's, as it was read from the file."""
    return int.from_bytes(header[index * _WORD_BYTES : (index + 1) * _WORD_BYTES], "little")


def _is_swept(descriptor: int, cluster_id: str) -> bool:
    header = os.pread(descriptor, arena_format.HEADER_BYTES, 0)
    spec = ArenaIdentity.unpack(header).spec
    if spec is None or spec.cluster_id == cluster_id or header_word(header, arena_format.KEPT_WORD):
        return False
    for row in range(spec.num_readers):
        start = spec.rows_offset + row * spec.row_bytes
        words = os.pread(descriptor, arena_format.ROW_HEADER_BYTES, start)
        pid, ticks = (header_word(words, i) for i in (arena_format.ROW_PID_WORD, arena_format.ROW_START_WORD))
        if pid and ProcessId(pid, ticks).is_alive():
            return False
    return True


def _locked(path: Path) -> int | None:
    """Open or create the file and lock it; None when the name no longer leads to what was locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            return descriptor
    except BlockingIOError:
        owner = header_word(os.pread(descriptor, arena_format.HEADER_BYTES, 0), arena_format.OWNER_PID_WORD)
        os.close(descriptor)
        raise ArenaOwnedError(
            f"{path} is owned by the live process {owner or '(starting)'}: one CacheServer runs per node and"
            " cluster; stop that one, or give this cluster another id"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_locked(descriptor: int) -> bool:
    """Lock a file unless another has; tell whether it is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether the name leads to what is open: between opening and locking the file may have gone."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _difference(descriptor: int, spec: ArenaSpec) -> str | None:
    header = os.pread(descriptor, arena_format.HEADER_BYTES, 0)
    difference = ArenaIdentity.unpack(header).difference(spec)
    if difference is not None:
        return difference
    if os.fstat(descriptor).st_size != spec.file_bytes:
        return "its file is cut short"
    if header_word(header, arena_format.USABLE_WORD) > spec.num_slots:
        return "its header is damaged"
    return None
