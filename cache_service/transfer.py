"""Transfer: one-sided reads of another node's registered memory, arena to arena (I7). Nobody writes over it.

The owner of the memory takes no part in a read; leases keep what is read in place, checksums prove it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cache_service.remote_worker import Batch

MAX_DESCRIPTORS = 256
"""Runs of bytes in one request; longer batches are split, as Mooncake stalls on them."""


class ReadStatus(Enum):
    """What became of one run of bytes. All but READ leave anything in the buffer."""

    READ = "read"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(frozen=True)
class RemoteRun:
    """Bytes at `address` in a segment's memory, to be read into `into`, registered memory of the reader."""

    address: int
    into: memoryview


class TransferError(Exception):
    """A transfer cannot be set up; the message says what was found and what to change."""


class Transfer(Protocol):
    """One process's end of the wire. Methods may be called from any thread."""

    segment: str
    """What others call this process's memory."""

    def register(self, memory: memoryview) -> int:
        """Let others read `memory`, and reads go into it; return the address of its first byte.

        Raises TransferError. The memory stays mapped until `close`.
        """
        ...

    def read(self, segment: str, runs: Sequence[RemoteRun], timeout_s: float) -> Batch[ReadStatus]:
        """Read runs from a segment; one status a run, in order; return within `timeout_s`.

        Whatever fails is an answer, never an exception. After a timeout or a failure the buffers may be
        written still: until `quiet` of the batch is set.
        """
        ...

    def forget(self, segment: str) -> None:
        """Drop all that is held for a segment whose owner is gone or has restarted."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Give everything back; False where a read still hangs: the memory must then stay mapped."""
        ...
