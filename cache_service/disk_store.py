"""DiskStore: records as files of one folder, bounded, least recently used first out. Owned by one process.

Files are written whole under another name and then linked into place, so a kill leaves none half written.
What in the folder is not named as a record is another's, and left alone. Files are their user's only.
Nothing is ever fsynced: after a crash of the machine a file may hold less than was written, which its
checksums show; a cache that is slow to write would cost more than the pages lost.
"""

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_service.keys import PageKey
from cache_service.remote import (
    RECORD_HEADER_BYTES,
    GetResult,
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStats,
    pack_header,
    read_header,
    run_get,
    run_put,
    verify,
)
from cache_service.remote_worker import Batch, RemoteWorker, in_parts

_SUFFIX = ".page"
_TEMPORARY_SUFFIX = ".writing"
_OURS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}-v[0-9]+\.page(\.writing)?")
"""Records by any layout and format version (see RecordLayout.name), whole or half written."""
_LOCK_NAME = "in-use.lock"


class DiskStoreError(Exception):
    """The folder cannot be used; the message says which, why, and what to change."""


class DiskStore:
    """See RemoteStore. Records of other formats or layouts in the folder are kept until their turn to go.

    `wall_clock` gives files their time of last use, which orders them after a restart; `lock` is flock.
    """

    def __init__(
        self,
        folder: Path,
        layout: RecordLayout,
        max_bytes: int,
        *,
        wall_clock: Callable[[], float] = time.time,
        lock: Callable[[int, int], None] = fcntl.flock,
    ) -> None:
        record_bytes = RECORD_HEADER_BYTES + layout.slot_bytes
        if max_bytes < record_bytes:
            raise DiskStoreError(
                f"a disk store of {max_bytes} bytes holds no page: one takes {record_bytes}; raise its size"
            )
        self.stats = RemoteStats()
        self.num_evicted = 0
        self._folder = folder
        self._layout = layout
        self._max_bytes = max_bytes
        self._record_bytes = record_bytes
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> bytes, least recently used first
        self._num_bytes = 0
        self._closer: threading.Thread | None = None
        self._lock_descriptor = self._own_folder(lock)
        try:
            self._scan()
            self._reader = RemoteWorker("disk-store-reader")
            self._writer = RemoteWorker("disk-store-writer")
        except BaseException:
            os.close(self._lock_descriptor)
            raise

    @property
    def num_bytes(self) -> int:
        """Of all records in the folder."""
        return self._num_bytes

    @property
    def num_records(self) -> int:
        """Records in the folder, those of other formats and layouts too."""
        return len(self._files)

    def put(self, pages: Sequence[PageRecord], timeout_s: float) -> Batch[PutStatus]:
        """See RemoteStore."""

        def work(batch: Batch[PutStatus]) -> None:
            in_parts(batch, pages, 1, lambda part: [self._put(part[0])])

        return run_put(self._writer, work, pages, timeout_s)

    def get(self, pages: Sequence[PageBuffer], timeout_s: float) -> Batch[GetResult]:
        """See RemoteStore."""

        def work(batch: Batch[GetResult]) -> None:
            in_parts(batch, pages, 1, lambda part: [self._get(part[0])])

        return run_get(self._reader, work, pages, timeout_s)

    def known_keys(self) -> list[PageKey]:
        """See RemoteStore; by the names of the files, whose bytes nobody has looked at."""
        with self._lock:
            names = list(self._files)
        keys = (self._layout.key_of(name.removesuffix(_SUFFIX)) for name in names)
        return [key for key in keys if key is not None]

    def close(self, timeout_s: float) -> bool:
        """See RemoteStore. The files stay."""
        for worker in (self._reader, self._writer):
            worker.close(0.0)
        if self._closer is None:
            self._closer = threading.Thread(target=self._leave_folder, name="disk-store-close", daemon=True)
            self._closer.start()
        self._closer.join(timeout_s)
        return not self._closer.is_alive()

    def _leave_folder(self) -> None:
        """Let others have the folder once nothing is read or written there."""
        self._reader.join()
        self._writer.join()
        os.close(self._lock_descriptor)

    def _own_folder(self, lock: Callable[[int, int], None]) -> int:
        """Make the folder if need be, and lock it: another process's idea of its bytes would be wrong."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskStoreError(
                f"disk store {self._folder}: {error.strerror}; give a folder this user may write to"
            ) from error
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DiskStoreError(
                f"disk store {self._folder} is in use by another process; each CacheServer needs its own"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise DiskStoreError(
                f"disk store {self._folder} cannot be locked: {error.strerror}; give a folder on a local disk"
            ) from error
        return descriptor

    def _scan(self) -> None:
        """Find the files of former runs; remove what they left half written. The bytes are not read."""
        found: list[tuple[float, str, int]] = []
        try:
            for entry in os.scandir(self._folder):
                if not _OURS.fullmatch(entry.name):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    raise DiskStoreError(
                        f"disk store {self._folder}: {entry.name} is named as a record and is no file; move"
                        " it away, or give another folder"
                    )
                if entry.name.endswith(_TEMPORARY_SUFFIX):
                    Path(entry.path).unlink(missing_ok=True)
                else:
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, entry.name, status.st_size))
        except OSError as error:
            raise DiskStoreError(
                f"disk store {self._folder}: {error.strerror}: {error.filename}; give a folder this user may"
                " read and write"
            ) from error
        self._files.update((name, size) for _, name, size in sorted(found))
        self._num_bytes = sum(self._files.values())
        self._make_room(0)

    def _put(self, page: PageRecord) -> PutStatus:
        path = self._path(page.key)
        with self._lock:
            if path.name in self._files:
                return PutStatus.PRESENT
            self._make_room(self._record_bytes)
        temporary = path.with_name(f"{path.name}{_TEMPORARY_SUFFIX}")
        try:
            with open(temporary, "xb", buffering=0, opener=_open_private) as file:
                parts = [memoryview(pack_header(self._layout, page)), page.data]
                _write_whole(file.fileno(), parts)
            if not self._link(temporary, path):
                return PutStatus.PRESENT
            self._note_use(path)
            return PutStatus.STORED
        except OSError as error:
            self.stats.count_failure(f"put: {error.strerror}")
            return PutStatus.FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else PutStatus.FAILED
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give a record its name; False where another has it, which then is in the account at least."""
        with self._lock:
            try:
                os.link(temporary, path)
            except FileExistsError:
                self._files[path.name] = path.lstat().st_size
                self._num_bytes += self._files[path.name]
                return False
            self._files[path.name] = self._record_bytes
            self._num_bytes += self._record_bytes
            return True

    def _get(self, page: PageBuffer) -> GetResult:
        path = self._path(page.key)
        header = bytearray(RECORD_HEADER_BYTES)
        try:
            with path.open("rb", buffering=0) as file:
                num_read = os.preadv(file.fileno(), [header, page.data], 0)
                while RECORD_HEADER_BYTES <= num_read < self._record_bytes:
                    more = os.preadv(file.fileno(), [page.data[num_read - RECORD_HEADER_BYTES :]], num_read)
                    if not more:
                        break
                    num_read += more
        except FileNotFoundError:
            with self._lock:
                if not os.path.lexists(path):  # else it was put meanwhile
                    self._forget(path.name)
            return GetResult(GetStatus.MISSING)
        except OSError as error:
            self.stats.count_failure(f"get: {error.strerror}")
            return GetResult(GetStatus.FAILED)
        result = read_header(header, self._layout, page.key)
        if result.status is GetStatus.FOUND and num_read < self._record_bytes:
            result = GetResult(GetStatus.CORRUPT)
        result = verify(result, self._layout, page)
        if result.status is GetStatus.FOUND:
            with self._lock:
                if path.name in self._files:
                    self._files.move_to_end(path.name)
            self._note_use(path)
        else:  # under this name nobody else can want it
            self._remove(path.name)
        return result

    def _note_use(self, path: Path) -> None:
        now_s = self._wall_clock()
        with contextlib.suppress(OSError):  # it may have been evicted meanwhile
            os.utime(path, (now_s, now_s))

    def _make_room(self, num_bytes: int) -> None:
        """Evict until `num_bytes` more fit. Readers of an evicted file still read it whole."""
        while self._files and self._num_bytes + num_bytes > self._max_bytes:
            name, size = self._files.popitem(last=False)
            self._num_bytes -= size
            self.num_evicted += 1
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def _remove(self, name: str) -> bool:
        with self._lock:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
            return self._forget(name)

    def _forget(self, name: str) -> bool:
        """Take a file out of the account. Under the lock."""
        size = self._files.pop(name, None)
        self._num_bytes -= size or 0
        return size is not None

    def _path(self, key: PageKey) -> Path:
        return self._folder / f"{self._layout.name(key)}{_SUFFIX}"


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_whole(descriptor: int, parts: list[memoryview]) -> None:
    """Write all parts one after another; a write may take less than it was given."""
    parts = [part.cast("B") for part in parts]
    while parts:
        written = os.writev(descriptor, parts)
        while parts and written >= parts[0].nbytes:
            written -= parts.pop(0).nbytes
        if parts:
            parts[0] = parts[0][written:]
