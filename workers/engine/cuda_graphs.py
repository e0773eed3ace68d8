"""CudaGraphs: captures passes as CUDA graphs, which share one pool of memory. Used by GraphRunner."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


class CudaGraphs:
    """Captures on a stream of its own. Every graph's memory is the others' too: one replays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        """Run `compute` once, then capture it; return what replays it on the current stream.

        It allocates what it needs outside the graph on its first run. What it returns while it is captured
        is dropped: results have to be written where they last. Raises RuntimeError.
        """
        before = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            compute()
            # Other threads go on copying pages, and NCCL's watches its events.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                compute()
            finally:
                self._end(graph)
        before.wait_stream(self._stream)
        return graph.replay

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
