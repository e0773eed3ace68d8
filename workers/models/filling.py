"""Puts a checkpoint's tensors, or seeded random ones, where placements say. For models and drafts alike.

Tensors are streamed: beside the shard, at most one tensor's chunk of rows is in memory.
"""

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from workers.layers.placement import Placement
from workers.models.config import ModelError
from workers.models.stored_tensor import Octets, StoredTensor

_CHUNK_BYTES = 32 << 20
"""Of float32 rows converted at a time."""
_DUMMY_ROWS = 256
"""Rows of a dummy tensor made from one seed."""
_DRAWN_ON_DEVICE = 1 << 22
"""Dummy tensors of more values are drawn by the device that holds them: one core takes a minute for 8
billion. Smaller ones are the CPU's, so that a tiny model is the same everywhere."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: waking others for thousands of small copies takes 11 s instead of 1.6 s for
    SmolLM2 when the cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class TorchWeight:
    """A StoredTensor over a tensor on the CPU, mapped from its file, not copied."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.shape = tuple(tensor.shape)
        self.kind = str(tensor.dtype)
        self.tensor = tensor

    def raw(self) -> Octets:
        """See StoredTensor."""
        octets: Octets = self.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return octets

    def rows(self, first: int, last: int) -> torch.Tensor:
        """See StoredTensor; integers stay what they are."""
        return self.tensor[first:last]


def safetensors_weights(files: Iterable[Path], wanted: Container[str] | None = None) -> Iterator[TorchWeight]:
    """Yield the tensors of `files` that are `wanted` (None: all), in file order; others are not read.

    Raise ModelError for files that are cut short.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    if wanted is None or name in wanted:
                        yield TorchWeight(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({error}); is it truncated? Fetch it again"
            ) from error


def place(placement: Placement, tensor: StoredTensor, source: Path) -> None:
    """Copy this rank's share of `tensor`. Raise ModelError, naming `source`, for another shape."""
    if tensor.shape != placement.shape:
        raise ModelError(
            f"{source}: tensor {tensor.name} has shape {tensor.shape}; the configuration needs "
            f"{placement.shape}"
        )
    row_len = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(1, _CHUNK_BYTES // (4 * row_len))
    for run in placement.rows:
        for first in range(0, run.length, step):
            last = min(first + step, run.length)
            rows = tensor.rows(run.source + first, run.source + last)
            target = placement.parameter[run.target + first : run.target + last]
            if placement.columns is None:
                target.copy_(rows)
                continue
            for columns in placement.columns:
                target[:, columns.target : columns.target + columns.length].copy_(
                    rows[:, columns.source : columns.source + columns.length]
                )


def check_complete(missing: set[str], source: Path) -> None:
    """Raise ModelError where tensors are missing."""
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ModelError(f"{source}: {len(missing)} tensors are missing, among them {names}")


def fill_dummy(placements: Mapping[str, Placement], seed: int) -> None:
    """Fill every parameter with random values of its name and `seed`."""
    for name, placement in placements.items():
        weight = _DummyWeight(name, placement.shape, seed, placement.parameter.device)
        place(placement, weight, Path("dummy"))


class _DummyWeight:
    """Random values that depend on (seed, name, row), so that every rank count gives the same model.

    Where `device` draws them itself they are those of its kind of device.
    """

    kind = "dummy"

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        self.name = name
        self.shape = shape
        self._seed = seed
        self._device = device if math.prod(shape) > _DRAWN_ON_DEVICE else torch.device("cpu")

    def raw(self) -> Octets:
        return np.empty(0, np.uint8)

    def rows(self, first: int, last: int) -> torch.Tensor:
        if len(self.shape) == 1:
            if self.name.endswith("norm.weight"):
                return torch.ones(last - first)
            return self._chunk(0, self.shape[0])[first:last] * 0.1
        start = first // _DUMMY_ROWS * _DUMMY_ROWS
        chunks = [
            self._chunk(row, min(_DUMMY_ROWS, self.shape[0] - row)) for row in range(start, last, _DUMMY_ROWS)
        ]
        return torch.cat(chunks)[first - start : last - start]

    def _chunk(self, row: int, num_rows: int) -> torch.Tensor:
        word = hashlib.sha256(f"{self._seed}/{self.name}/{row}".encode()).digest()[:8]
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(word, "little") >> 1)
        shape = (num_rows, *self.shape[1:])
        # Matrices keep the scale of what they multiply.
        scale = self.shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return torch.empty(shape, device=self._device).normal_(0.0, scale, generator=generator)
