"""InProcessTransfer: a Transfer between CacheServers of one process, for tests and for one node."""

import threading
from collections.abc import Sequence

from cache_service.remote_worker import Batch, RemoteWorker
from cache_service.transfer import ReadStatus, RemoteRun, TransferError

_ALIGNMENT = 4096


class InProcessNetwork:
    """The segments that can reach each other; addresses are its own, not the processor's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: dict[str, dict[int, memoryview]] = {}
        self._next_address = _ALIGNMENT

    def join(self, segment: str) -> None:
        """Add a segment without memory."""
        with self._lock:
            if segment in self._segments:
                raise TransferError(f"segment {segment} exists already; each CacheServer needs its own name")
            self._segments[segment] = {}

    def leave(self, segment: str) -> None:
        """Remove a segment; reads of it fail from now on. Idempotent."""
        with self._lock:
            self._segments.pop(segment, None)

    def add(self, segment: str, memory: memoryview) -> int:
        """Make memory readable; return its address."""
        with self._lock:
            address = self._next_address
            self._next_address += -(-memory.nbytes // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
            self._segments[segment][address] = memory.cast("B")
            return address

    def find(self, segment: str, address: int, num_bytes: int) -> memoryview | None:
        """Return registered bytes; None where the segment or the bytes are not there."""
        with self._lock:
            memories = self._segments.get(segment, {}).items()
        for first, memory in memories:
            if first <= address and address + num_bytes <= first + memory.nbytes:
                return memory[address - first : address - first + num_bytes]
        return None


class InProcessTransfer:
    """See Transfer."""

    def __init__(self, network: InProcessNetwork, segment: str) -> None:
        network.join(segment)
        self.segment = segment
        self._network = network
        self._worker = RemoteWorker("in-process-transfer")

    def register(self, memory: memoryview) -> int:
        """See Transfer."""
        return self._network.add(self.segment, memory)

    def read(self, segment: str, runs: Sequence[RemoteRun], timeout_s: float) -> Batch[ReadStatus]:
        """See Transfer."""

        def work(batch: Batch[ReadStatus]) -> None:
            for place, run in enumerate(runs):
                if batch.is_cancelled:
                    return
                source = self._network.find(segment, run.address, run.into.nbytes)
                if source is None:
                    batch.fill(place, ReadStatus.FAILED)
                else:
                    run.into[:] = source
                    batch.fill(place, ReadStatus.READ)

        return self._worker.run(
            work, len(runs), timeout_s, timed_out=ReadStatus.TIMED_OUT, failed=ReadStatus.FAILED
        )

    def forget(self, segment: str) -> None:
        """See Transfer; nothing is held."""

    def close(self, timeout_s: float) -> bool:
        """See Transfer."""
        self._network.leave(self.segment)
        return self._worker.close(timeout_s)
