"""CudaGraphs: captures passes as CUDA graphs, which share one pool of memory. Used by GraphRunner."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch

Agree = Callable[[bool], bool]
"""Tells whether all is well on every rank: TPGroup.agree; in a group of one `bool`."""


class CaptureError(RuntimeError):
    """A pass could not be captured, on this rank or another. No rank has run what another has not."""


class PassGraphs(Protocol):
    """What the runners need of CudaGraphs."""

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Run `compute`, then prepare it; return what repeats it."""
        ...

    def capturing(self) -> AbstractContextManager[None]:
        """Return what all captures are made within."""
        ...

    def used_bytes(self) -> int:
        """Return how much of the device's memory is taken, by whomever."""
        ...

    def close(self) -> None:
        """Let go of all that was captured; nothing of it is repeated any more."""


def require_all(agree: Agree, error: RuntimeError | None) -> None:
    """Raise CaptureError on every rank where there is an `error` on any.

    Ranks come here from a capture, in which no collective runs: what failed there is given up on all of them
    before a rank replays it, and waits in it for a rank that cannot.
    """
    if not agree(error is None):
        raise CaptureError(str(error) if error else "it failed on another rank") from error


class CudaGraphs:
    """Captures on a stream of its own. Every graph's memory is the others' too: one replays at a time."""

    def __init__(self, device: torch.device, agree: Agree = bool) -> None:
        self._device = device
        self._agree = agree
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: list[torch.cuda.CUDAGraph] = []
        self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Run `compute` once, then capture it; return what replays it on the current stream.

        It allocates what it needs outside the graph on its first run. What it returns while it is captured
        is dropped: results have to be written where they last. All ranks call it together. Raises
        CaptureError on all of them, and RuntimeError where `compute` itself fails.
        """
        before = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        failure: RuntimeError | None = None
        with torch.cuda.stream(self._stream):
            compute()
            try:
                self._capture(graph, compute)
            except RuntimeError as error:
                failure = error
        before.wait_stream(self._stream)
        require_all(self._agree, failure)
        self._captured.append(graph)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, compute: Callable[[], object]) -> None:
        # Other threads go on copying pages, and NCCL's watches its events.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            compute()
        finally:
            self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture; after one that failed the next begins with memory of its own."""
        try:
            graph.capture_end()
        except RuntimeError:
            # torch's allocator stays in a capture that fails, and may go on to ask the graph about it.
            self._failed.append(graph)
            with suppress(RuntimeError):
                end: Callable[..., None] = getattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None)
                end(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            raise

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Hold garbage collection off: what it frees may not be freed while a stream is captured."""
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()

    def used_bytes(self) -> int:
        """Return how much of the device's memory is taken, by whomever."""
        num_free, num_bytes = torch.cuda.mem_get_info(self._device)
        return int(num_bytes - num_free)

    def close(self) -> None:
        """Let go of every graph: NCCL frees no communicator that one of them holds a collective of."""
        for graph in self._captured:
            graph.reset()
        self._captured.clear()
