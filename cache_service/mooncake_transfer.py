"""MooncakeTransfer: arena to arena over Mooncake's TransferEngine, by TCP or RDMA.

A read that Mooncake gives up may write its buffers long after (0.3.13, seen over TCP). Only the end of an
engine ends that, so reads have an engine of their own: after a failure it is replaced, and the failed reads'
buffers are quiet once it is destroyed. That holds the interpreter for 0.1 to 0.8 s: for failures only.
Its wait for a read spins, so a thread first sleeps for most of the time that the read is likely to take: that
leaves the core to others, on few cores to the read itself.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cache_service.mooncake_library import (
    PEER_TO_PEER,
    MooncakeError,
    MooncakeOptions,
    address_of,
    load_engine,
)
from cache_service.remote_worker import Batch, RemoteWorker
from cache_service.transfer import MAX_DESCRIPTORS, ReadStatus, RemoteRun, TransferError

logger = logging.getLogger(__name__)

MAX_PART_BYTES = 64 << 20
"""In one request: a slow link still brings it within Mooncake's own timeout."""
_LEAST_PACED_BYTES = 4 << 20
"""Smaller reads take their time for other reasons than their size, and little."""
_REST_RATIO = 0.8
_MAX_REST_S = 1.0
_NO_BATCH = (0, -1, (1 << 64) - 1)
"""What Mooncake calls a batch that it could not begin."""


class MooncakeTransfer:
    """See Transfer. Each peer's reads run in a thread of their own: one that hangs holds up no other."""

    def __init__(self, options: MooncakeOptions) -> None:
        self._options = options
        self._server: Any = _start_engine(options)
        self.segment = f"{options.node_address}:{self._server.get_rpc_port()}"
        self._memories: list[memoryview] = []
        self._lock = threading.Lock()
        self._reader: _ReadingEngine | None = None
        self._retired: list[_ReadingEngine] = []
        self._peers: dict[str, _Peer] = {}
        self._is_closed = False

    def register(self, memory: memoryview) -> int:
        """See Transfer."""
        address = _register(self._server, memory)
        with self._lock:
            self._memories.append(memory)
            if self._reader is not None:
                _register(self._reader.engine, memory)
        return address

    def read(self, segment: str, runs: Sequence[RemoteRun], timeout_s: float) -> Batch[ReadStatus]:
        """See Transfer."""
        worker, pace = self._peer(segment)
        return worker.run(
            lambda batch: self._read(batch, segment, runs, pace),
            len(runs),
            timeout_s,
            timed_out=ReadStatus.TIMED_OUT,
            failed=ReadStatus.FAILED,
        )

    def forget(self, segment: str) -> None:
        """See Transfer; its thread ends once its read has."""
        with self._lock:
            peer = self._peers.pop(segment, None)
        if peer is not None:
            peer.worker.close(0.0)

    def close(self, timeout_s: float) -> bool:
        """See Transfer."""
        with self._lock:
            self._is_closed = True
            workers = [peer.worker for peer in self._peers.values()]
        # All are told before any is waited for.
        ended = [worker.close(0.0) for worker in workers]
        ended = [worker.close(timeout_s / len(workers)) for worker in workers]
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.retire()
        self._server = None
        with self._lock:
            self._retired = [engine for engine in self._retired if not engine.is_destroyed]
            return all(ended) and not self._retired

    # In a peer's thread.

    def _read(self, batch: Batch[ReadStatus], segment: str, runs: Sequence[RemoteRun], pace: "_Pace") -> None:
        with self._reading() as reader:
            for start, end in _parts(runs):
                if batch.is_cancelled:
                    return
                if not reader.read(segment, runs[start:end], pace):
                    reader.hold(batch)
                    self._retire(reader)
                    return  # the rest would wait for the same peer
                for place in range(start, end):
                    batch.fill(place, ReadStatus.READ)

    @contextlib.contextmanager
    def _reading(self) -> Iterator["_ReadingEngine"]:
        with self._lock:
            if self._reader is None:
                self._reader = _ReadingEngine(self._options, self._memories)
            reader = self._reader
            reader.enter()
        try:
            yield reader
        finally:
            reader.leave()

    def _retire(self, reader: "_ReadingEngine") -> None:
        with self._lock:
            if self._reader is reader:
                self._reader = None
                self._retired = [engine for engine in self._retired if not engine.is_destroyed]
                self._retired.append(reader)
        reader.retire()

    def _peer(self, segment: str) -> "_Peer":
        with self._lock:
            peer = self._peers.get(segment)
            if peer is None:
                peer = self._peers[segment] = _Peer(RemoteWorker(f"mooncake-read-{segment}"), _Pace())
                if self._is_closed:
                    peer.worker.close(0.0)
            return peer


class _Pace:
    """How fast a peer's bytes come. Quick to rise, slow to fall: too long a sleep costs more than a spin."""

    def __init__(self) -> None:
        self._bytes_per_s = 0.0

    def rest_s(self, num_bytes: int) -> float:
        """Return how long a read of so many bytes is not over for sure."""
        if num_bytes < _LEAST_PACED_BYTES or not self._bytes_per_s:
            return 0.0
        return min(_REST_RATIO * num_bytes / self._bytes_per_s, _MAX_REST_S)

    def note(self, num_bytes: int, seconds: float) -> None:
        """Learn from a read."""
        if num_bytes >= _LEAST_PACED_BYTES:
            found = num_bytes / seconds
            self._bytes_per_s = max(found, (self._bytes_per_s + found) / 2)


class _Peer(NamedTuple):
    """Whose memory is read."""

    worker: RemoteWorker
    pace: _Pace


class _ReadingEngine:
    """An engine that reads; once retired, the last call to leave destroys it."""

    def __init__(self, options: MooncakeOptions, memories: Sequence[memoryview]) -> None:
        self.engine: Any = _start_engine(options)
        for memory in memories:
            _register(self.engine, memory)
        self._lock = threading.Lock()
        self._num_calls = 0
        self._held: list[Batch[ReadStatus]] = []
        self._is_retired = False

    @property
    def is_destroyed(self) -> bool:
        """Nothing reads or writes for it any more."""
        return self.engine is None

    def enter(self) -> None:
        """Begin a call."""
        with self._lock:
            self._num_calls += 1

    def leave(self) -> None:
        """End a call."""
        with self._lock:
            self._num_calls -= 1
        self._destroy_if_over()

    def read(self, segment: str, runs: Sequence[RemoteRun], pace: _Pace) -> bool:
        """Read what one request may hold; tell whether all is here. During a call."""
        lens = [run.into.nbytes for run in runs]
        begun_s = time.monotonic()
        into, addresses = [address_of(run.into) for run in runs], [run.address for run in runs]
        request = self.engine.batch_transfer_async_read(segment, into, addresses, lens)
        if request in _NO_BATCH:
            return False
        time.sleep(pace.rest_s(sum(lens)))
        if self.engine.get_batch_transfer_status([request]) != 0:
            return False
        pace.note(sum(lens), time.monotonic() - begun_s)
        return True

    def hold(self, batch: Batch[ReadStatus]) -> None:
        """Keep a failed batch's buffers busy until the engine is gone. During its call."""
        batch.hold()
        self._held.append(batch)

    def retire(self) -> None:
        """Let no new call begin; its maker hands it out no more."""
        with self._lock:
            self._is_retired = True
        self._destroy_if_over()

    def _destroy_if_over(self) -> None:
        with self._lock:
            if not self._is_retired or self._num_calls or self.engine is None:
                return
            self.engine = None  # its destructor closes the connections and joins its threads
            held, self._held = self._held, []
        for batch in held:
            batch.let_go()
        logger.info("mooncake's reading engine is replaced", extra={"failed_batches": len(held)})


def _parts(runs: Sequence[RemoteRun]) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of runs, each within what one request may hold."""
    start, num_bytes = 0, 0
    for place, run in enumerate(runs):
        is_full = place - start == MAX_DESCRIPTORS or num_bytes + run.into.nbytes > MAX_PART_BYTES
        if is_full and place > start:
            yield start, place
            start, num_bytes = place, 0
        num_bytes += run.into.nbytes
    if start < len(runs):
        yield start, len(runs)


def _start_engine(options: MooncakeOptions) -> Any:
    engine = load_engine(options).TransferEngine()
    code = engine.initialize(options.node_address, PEER_TO_PEER, options.protocol, options.rdma_devices)
    if code != 0:
        raise MooncakeError(
            f"Mooncake's transfer engine does not start on {options.node_address} over {options.protocol}"
            f" (code {code}); is that this node's address, and are its devices there"
            f" ({options.rdma_devices or 'all'})?"
        )
    return engine


def _register(engine: Any, memory: memoryview) -> int:
    address = address_of(memory)
    code = engine.register_memory(address, memory.nbytes)
    if code != 0:
        raise TransferError(
            f"Mooncake cannot register {memory.nbytes} bytes (code {code}); RDMA needs a locked-memory limit"
            " of at least so much (ulimit -l)"
        )
    return address
