"""Shared memory of a TP group's ranks on one node, for its boards: mapped by all, in no folder.

Used by CompletionBoard and MoveBoard while a group meets. No torch.
"""

import mmap
import os
import secrets
from pathlib import Path
from typing import Protocol


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
    """Map one run of zeroed memory, `name`, on all ranks. No folder has it: it ends with the last rank's.

    Raise OSError when a rank cannot open it: all ranks must run on one machine.
    """
    if rank > 0:
        told, _, memory_name = store.get(f"{name}_memory").decode().partition(" ")
        path = Path(told)
        if str(path.readlink()) != f"/memfd:{memory_name} (deleted)":  # on another machine it is another's
            raise FileNotFoundError(f"{path} is not {memory_name}: do all ranks run on one machine?")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        store.set(f"{name}_mapped_{rank}", "")
        return memory
    memory_name = f"eyrie-{name}-{secrets.token_hex(8)}"
    descriptor = os.memfd_create(memory_name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
        store.set(f"{name}_memory", f"/proc/{os.getpid()}/fd/{descriptor} {memory_name}")
        store.wait([f"{name}_mapped_{follower}" for follower in range(1, size)])
    finally:
        os.close(descriptor)
    return memory
