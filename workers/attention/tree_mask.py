"""TreeMask: what the tokens of rows that end in trees see, as FlashInfer's kernels read it.

Written on the device from what a batch says of its trees, once a pass: in a captured graph by the graph.
"""

from dataclasses import dataclass
from typing import Self

import torch

_ALIGNMENT = 16


@dataclass(frozen=True)
class TreeMask:
    """For B rows; of row r, of Q tokens over a context of K, token q sees place k where bit q * K + k of
    bits[starts[r]:] is set, the lowest bit of a byte first."""

    bits: torch.Tensor
    """[at least B * row_bytes] uint8"""
    starts: torch.Tensor
    """[B + 1] int32: row_bytes apart"""
    row_bytes: int

    @classmethod
    def room(cls, num_rows: int, row_bytes: int, bits: torch.Tensor) -> Self:
        """Return a mask for so many rows within `bits`."""
        assert num_rows * row_bytes <= min(len(bits), 2**31 - 1), (num_rows, row_bytes, len(bits))
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=bits.device) * row_bytes
        return cls(bits, starts, row_bytes)


def row_bytes(num_tokens: int, max_context_len: int) -> int:
    """Return how many bytes the mask of a row of so many tokens takes at most."""
    return -(-num_tokens * max_context_len // (8 * _ALIGNMENT)) * _ALIGNMENT
