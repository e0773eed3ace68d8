"""CUDA's streams and pinned memory for the mover: copy engines move the pages, no kernel does."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy
import torch
from numpy.typing import NDArray

from workers.kvcache.copy_streams import Copy
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.move_queue import Mark
from workers.kvcache.moves import MoveKind

BatchCopy = Callable[[list[int], list[int], list[int], int], None]
"""Enqueues copies on a stream: targets, sources, bytes, the stream's handle."""


class CudaStreams:
    """One stream for SAVEs, one for LOADs. Marks are events whose host waits sleep instead of spinning.

    `batch_copy` None: each run of pages is a copy of its own, 12 us of Python each.
    """

    def __init__(self, pool: KVPool, batch_copy: BatchCopy | None) -> None:
        self._data = pool.data
        self._bundle_bytes = pool.layout.bundle_bytes
        self._device = pool.data.device
        self._base = pool.data.data_ptr()
        self._batch_copy = batch_copy
        self._streams: dict[MoveKind, torch.cuda.Stream] = {
            "load": torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
            "save": torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
        }

    def mark(self) -> Mark:
        """Record an event on the calling thread's current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark) -> None:
        """Have the calling thread's current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(cast(torch.cuda.Event, mark))

    def copy(self, kind: MoveKind, copies: Sequence[Copy], after: Mark | None) -> tuple[Mark, Mark]:
        """Enqueue copies on the kind's stream."""
        stream = self._streams[kind]
        begin, end = (
            torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        if after is not None:
            stream.wait_event(cast(torch.cuda.Event, after))
        begin.record(stream)
        if self._batch_copy is None:
            self._copy_runs(kind, copies, stream)
        else:
            device = [self._base + copy.page * self._bundle_bytes for copy in copies]
            host = [copy.address for copy in copies]
            sizes = [copy.num_pages * self._bundle_bytes for copy in copies]
            targets, sources = (device, host) if kind == "load" else (host, device)
            self._batch_copy(targets, sources, sizes, stream.cuda_stream)
        end.record(stream)
        return begin, end

    def seconds(self, begin: Mark, end: Mark) -> float:
        """Return the device's time between two marks of `copy`."""
        ms: float = cast(torch.cuda.Event, begin).elapsed_time(cast(torch.cuda.Event, end))
        return ms / 1e3

    def drain(self, kind: MoveKind) -> None:
        """Wait for the kind's stream."""
        self._streams[kind].synchronize()

    def enter_thread(self) -> None:
        """Make the pool's device current."""
        torch.cuda.set_device(self._device)

    def _copy_runs(self, kind: MoveKind, copies: Sequence[Copy], stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for page, num_pages, address in copies:
                octets = (ctypes.c_uint8 * (num_pages * self._bundle_bytes)).from_address(address)
                host = torch.frombuffer(octets, dtype=torch.uint8)
                device = self._data[page : page + num_pages].view(-1)
                target, source = (device, host) if kind == "load" else (host, device)
                target.copy_(source, non_blocking=True)


class CudaPinning:
    """Pins host memory for the current device's context, of which all ranks' processes have their own."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Register memory in place. Raises RuntimeError."""
        torch.cuda.check_error(_cudart().cudaHostRegister(address, num_bytes, 0))

    def unpin(self, address: int) -> None:
        """Undo `pin`. Raises RuntimeError."""
        torch.cuda.check_error(_cudart().cudaHostUnregister(address))

    def pinned(self, num_bytes: int) -> NDArray[numpy.uint8]:
        """Return new pinned memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def batch_copy() -> BatchCopy | None:
    """Return CUDA 13's call for many copies at once; None: this environment has none.

    CUDA 12's has another signature.
    """
    if torch.version.cuda is None or int(torch.version.cuda.partition(".")[0]) < 13:
        return None
    try:
        from cuda.bindings import runtime as cuda_runtime
    except ImportError:
        return None
    runtime: Any = cuda_runtime  # without types of its own
    if not hasattr(runtime, "cudaMemcpyBatchAsync"):
        return None
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    attributes.flags = int(runtime.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute)

    def copy(targets: list[int], sources: list[int], sizes: list[int], stream: int) -> None:
        (error,) = runtime.cudaMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), [attributes], [0], 1, stream
        )
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{len(sizes)} copies could not be enqueued: {error.name}")

    return copy


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # without types of its own
