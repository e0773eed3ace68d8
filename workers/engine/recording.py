"""Recording: a decode step on CPU as a list of launches over fixed addresses, replayed without its Python.

Recorded once per bucket by GraphRunner. What a step costs beside its kernels is the layers' Python: 4,000
calls for 30 layers, where a replay makes 250. Views are resolved, addresses stay, tensors lie in an arena.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workers.native.kernels import NativeKernels

Launch = Callable[[], object]

_ALIGNMENT = 64
_CHUNK_BYTES = 4 << 20
_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
_CONVERSIONS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class RecordingError(RuntimeError):
    """A step that cannot be replayed; it runs eager."""


class Arena:
    """Memory for recorded tensors. All buckets share it: one replay at a time, and results are cloned out."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._chunk, self._offset = 0, 0

    def reset(self) -> None:
        """Begin another recording, over the same memory."""
        self._chunk, self._offset = 0, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor that nothing else in this recording overlaps."""
        num_bytes = prod(shape) * dtype.itemsize
        while self._chunk < len(self._chunks) and self._offset + num_bytes > len(self._chunks[self._chunk]):
            self._chunk, self._offset = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(num_bytes, _CHUNK_BYTES), dtype=torch.uint8))
        start = self._offset
        self._offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._chunks[self._chunk][start : start + num_bytes].view(dtype).view(*shape)


class RecordingKernels(NativeKernels):
    """NativeKernels whose launches go to `launches` as well while that is a list."""

    def __init__(self, library: Path, max_matmul_rows: int | None = None) -> None:
        self.launches: list[Launch] | None = None
        super().__init__(library, max_matmul_rows)

    def _launched(self, function: Callable[..., int], arguments: list[type]) -> Callable[..., int]:
        function = super()._launched(function, arguments)

        def launch(*arguments: object) -> int:
            if self.launches is not None:
                self.launches.append(partial(function, *arguments))
            return function(*arguments)

        return launch


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types none of it
    """Runs what is inside `with` and records it: kernels' launches and torch's operations, in order.

    A replay reads the same inputs, whatever they hold by then, and writes the same results. Nothing recorded
    may depend on a value on the host, or communicate: neither would be repeated.
    """

    def __init__(self, kernels: RecordingKernels, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._arena = arena
        self._launches: list[Launch] = []
        self._kept: list[torch.Tensor] = []

    def __enter__(self) -> "Recording":
        self._arena.reset()
        self._kernels.launches = self._launches
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._kernels.launches = None

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and record it, unless it only allocates or makes a view."""
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            return self._arena.take(out.shape, out.dtype)
        if func._schema.is_mutable:
            self._launches.append(partial(func, *args, **kwargs))
            return out
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        results = list(out) if isinstance(out, list | tuple) else [out]
        if not all(isinstance(result, torch.Tensor) for result in results):
            raise RecordingError(f"{func} hands a value to the host, which a replay would not do again")
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if all(result.untyped_storage().data_ptr() in storages for result in results):
            return out  # a view: an address, found for good
        self._kept += results
        if func in _CONVERSIONS:
            self._launches.append(partial(results[0].copy_, inputs[0]))
        elif len(results) == 1:
            self._launches.append(lambda: results[0].copy_(func(*args, **kwargs)))
        else:
            self._launches.append(lambda: _copy_all(results, func(*args, **kwargs)))
        return out

    def replay(self) -> None:
        """Repeat what was recorded."""
        for launch in self._launches:
            launch()

    @property
    def num_launches(self) -> int:
        """Count the operations of a replay."""
        return len(self._launches)


def _copy_all(results: Sequence[torch.Tensor], again: Sequence[torch.Tensor]) -> None:
    for result, value in zip(results, again, strict=True):
        result.copy_(value)
