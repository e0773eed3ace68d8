"""Copies between host and device in the compute stream's order: none of them waits for the device.

What the host has to know of that order are fences. Made by the Engine, used in its thread.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

HostValues = npt.NDArray[np.int64] | npt.NDArray[np.int32] | npt.NDArray[np.float32] | Sequence[int]


class Fence(Protocol):
    """A place in the compute stream, `torch.cuda.Event` for one."""

    def query(self) -> bool:
        """Tell whether the stream has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""


class CopyStream(Protocol):
    """Where copies are enqueued: on the compute stream, before the pass that reads them or behind it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue target = source, a staged input."""

    def upload(self, values: HostValues) -> torch.Tensor:
        """Enqueue a copy of values to the device and return it, of the array's type; of a list int64."""
        ...

    def take(self, target: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> None:
        """Enqueue target = source[index], all on the device."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Enqueue a copy to the host and return it; to be read once a later fence was passed."""
        ...

    def fence(self) -> Fence | None:
        """Return a fence behind all that is enqueued so far; None where it is already done."""


class InlineCopies:
    """The CPU's CopyStream: a copy is done when it returns."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy now."""
        target.copy_(source)

    def upload(self, values: HostValues) -> torch.Tensor:
        """Copy now: the caller may go on to change its array."""
        return torch.tensor(values)

    def take(self, target: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> None:
        """Take them now."""
        torch.index_select(source, 0, index, out=target)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself, which is there."""
        return tensor

    def fence(self) -> Fence | None:
        """Return None: nothing is pending."""
        return None


class CudaCopies:
    """The current CUDA stream of `device` as CopyStream.

    Buffers that are no staging set come from torch's pool of pinned memory, which hands none out again before
    the copies from and to it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy; `source` is pinned."""
        target.copy_(source, non_blocking=True)

    def upload(self, values: HostValues) -> torch.Tensor:
        """Enqueue a copy by way of a pinned one."""
        return torch.tensor(values).pin_memory().to(self._device, non_blocking=True)

    def take(self, target: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> None:
        """Enqueue the kernel."""
        torch.index_select(source, 0, index, out=target)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Enqueue a copy into pinned memory."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def fence(self) -> Fence | None:
        """Record an event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


def copies_to(device: torch.device) -> CopyStream:
    """Return the CopyStream of a device."""
    return CudaCopies(device) if device.type == "cuda" else InlineCopies()
