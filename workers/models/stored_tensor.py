"""StoredTensor: one tensor of a checkpoint, whatever the file; implemented per format."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Octets = npt.NDArray[np.uint8]


class StoredTensor(Protocol):
    """A named tensor that can be read row by row, and whose stored bytes can be hashed."""

    name: str
    """As Hugging Face's models name it."""
    shape: tuple[int, ...]
    kind: str
    """The stored type, for the digest."""

    def raw(self) -> Octets:
        """Return the bytes as stored; valid until the next tensor is asked for."""

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) (entries of a vector) on the CPU, in a floating-point dtype."""
