"""LayerKernels: what compiled kernels can take over from a decoder's layers.

The layers' own torch code is the reference; Decoder.adopt hands the kernels to every layer once it is loaded.
"""

from collections.abc import Callable
from typing import Protocol

import torch

Matmul = Callable[[torch.Tensor], torch.Tensor]
"""x [tokens, in_features] -> [tokens, out_features], bias included."""


class LayerKernels(Protocol):
    """Implemented by workers.native and workers.triton_kernels.

    Every result is a fresh tensor unless it says otherwise.
    """

    def matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return x W^T + b with weight [out_features, in_features] in a form of its own; None: not for this
        dtype or shape."""

    def gated_matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return silu_mul of x W^T + b, weight [2 * out_features, in_features] = [ gate | up ], in one go;
        None: nothing is won over matmul and silu_mul."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight, x [rows, size]."""

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta, and that normalised; both [rows, size] contiguous."""

    def rotate_(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate heads [tokens, heads, dim] in place by cos and sin [tokens, 1, dim / 2] (halves layout)."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up [rows, size] of gate_up [rows, 2 * size] = [ gate | up ]."""
