"""Shared memory of a TP group's ranks on one node, for its boards: mapped by all, its file gone at once.

Used by CompletionBoard and MoveBoard while a group meets. No torch.
"""

import mmap
import os
import secrets
from pathlib import Path
from typing import Protocol

_FOLDER = Path("/dev/shm")


class MeetingStore(Protocol):
    """What a board needs of the store at which a group meets, torch's TCPStore."""

    def set(self, key: str, value: str, /) -> None:
        """Tell all ranks a value."""

    def get(self, key: str, /) -> bytes:
        """Wait for a value."""
        ...

    def wait(self, keys: list[str], /) -> None:
        """Wait until all keys have been set."""


def map_shared(store: MeetingStore, name: str, rank: int, size: int, num_bytes: int) -> mmap.mmap:
    """Map one run of zeroed memory, `name`, on all ranks; its file is gone before this returns on rank 0.

    Raise OSError when a rank cannot open it: all ranks must share one machine's memory.
    """
    if rank > 0:
        memory = _map(Path(store.get(f"{name}_path").decode()), os.O_RDWR, num_bytes)
        store.set(f"{name}_mapped_{rank}", "")
        return memory
    path = _FOLDER / f"eyrie-{name}-{secrets.token_hex(8)}"
    try:
        memory = _map(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, num_bytes)
        store.set(f"{name}_path", str(path))
        store.wait([f"{name}_mapped_{follower}" for follower in range(1, size)])
    finally:
        path.unlink(missing_ok=True)
    return memory


def _map(path: Path, flags: int, num_bytes: int) -> mmap.mmap:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        if flags & os.O_CREAT:
            os.ftruncate(descriptor, num_bytes)
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
