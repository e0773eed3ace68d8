"""TritonKernels: the CUDA kernels as LayerKernels. Made by `cuda_kernels`, called in the engine's thread.

Which kernel computes a product is a function of its shape and number of rows alone, so that all ranks and all
runs compute alike.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from workers.layers.kernels import Matmul
from workers.triton_kernels import argmax, elementwise, kv_write, page_lines, tree_bits
from workers.triton_kernels.skinny_matmul import SkinnyConfig, skinny_config, skinny_matmul

SKINNY_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Switches:
    """What a benchmark turns off to show what it gains; no configuration reaches these."""

    dependent_launch: bool = True
    """Kernels begin while the one before them still runs, where the card can."""
    skinny_matmul: bool = True
    """Products of few rows by our kernel; else all by torch."""
    gated_matmul: bool = True
    """Gate, up and activation in one kernel for few rows."""
    late_launch: bool = True
    """Deep products let the next kernel begin at their end, not at once."""


ALL_ON = Switches()


class TritonKernels:
    """See LayerKernels. Holds no memory beside the weights that it was given."""

    def __init__(self, dependent_launch: bool, switches: Switches = ALL_ON) -> None:
        self._pdl = dependent_launch and switches.dependent_launch
        self._switches = switches

    def matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return x W^T + b over `weight` itself; None where torch computes all numbers of rows as well."""
        width, depth = weight.shape
        if not self._switches.skinny_matmul or not self._takes(weight, width, is_gated=False):
            return None

        def by_rows(x: torch.Tensor) -> torch.Tensor:
            config = self._config(width, depth, x.shape[0], is_gated=False)
            if config is None:
                return functional.linear(x, weight, bias)
            return skinny_matmul(x, weight, bias, config, is_gated=False, pdl=self._pdl)

        return by_rows

    def gated_matmul(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul | None:
        """Return silu(gate) * up of x W^T + b = [ gate | up ], in one kernel for few rows."""
        width, depth = weight.shape[0] // 2, weight.shape[1]
        if not self._switches.gated_matmul or not self._takes(weight, width, is_gated=True):
            return None

        def by_rows(x: torch.Tensor) -> torch.Tensor:
            config = self._config(width, depth, x.shape[0], is_gated=True)
            if config is None:
                return self.silu_mul(functional.linear(x, weight, bias))
            return skinny_matmul(x, weight, bias, config, is_gated=True, pdl=self._pdl)

        return by_rows

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight, x [rows, size]."""
        return elementwise.rms_norm(x, weight, eps, pdl=self._pdl)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta, and that normalised; both [rows, size] contiguous."""
        return elementwise.add_rms_norm(x, delta, weight, eps, pdl=self._pdl)

    def rotate_(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate heads [tokens, heads, dim] in place by cos and sin [tokens, 1, dim / 2] (halves layout)."""
        return elementwise.rotate_(heads, cos, sin, pdl=self._pdl)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up [rows, size] of gate_up [rows, 2 * size] = [ gate | up ]."""
        return elementwise.silu_mul(gate_up, pdl=self._pdl)

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """See kv_write.write_kv; for attention backends."""
        kv_write.write_kv(k, v, out_locations, pool_k, pool_v, pdl=self._pdl)

    def rotate_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """See kv_write.rotate_and_write_kv; for attention backends that are RotatingBackends."""
        kv_write.rotate_and_write_kv(q, k, v, cos, sin, out_locations, pool_k, pool_v, pdl=self._pdl)

    def line_up_pages(
        self,
        page_rows: torch.Tensor,
        num_columns: torch.Tensor,
        max_columns: int,
        context_lens: torch.Tensor,
        page_size: int,
        starts: torch.Tensor,
        pages: torch.Tensor,
        last_page_lens: torch.Tensor,
    ) -> None:
        """See page_lines.line_up_pages; for attention backends."""
        page_lines.line_up_pages(
            page_rows, num_columns, max_columns, context_lens, page_size, starts, pages, last_page_lens
        )

    def pack_tree(
        self,
        visible: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        num_before: int,
        bits: torch.Tensor,
        row_bytes: int,
    ) -> None:
        """See tree_bits.pack_tree; for attention backends."""
        tree_bits.pack_tree(visible, query_starts, context_lens, num_before, bits, row_bytes)

    def greedy_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """See argmax.greedy_tokens; for the sampler."""
        return argmax.greedy_tokens(logits, pdl=self._pdl)

    def greedy_keys(self, logits: torch.Tensor, first_id: int) -> torch.Tensor:
        """See argmax.greedy_keys; for the sampler of one rank of several."""
        return argmax.greedy_keys(logits, first_id, pdl=self._pdl)

    def _config(self, width: int, depth: int, rows: int, *, is_gated: bool) -> SkinnyConfig | None:
        config = skinny_config(width, depth, rows, is_gated=is_gated)
        if config is None or self._switches.late_launch:
            return config
        return replace(config, lets_go_late=False)

    def _takes(self, weight: torch.Tensor, width: int, *, is_gated: bool) -> bool:
        if weight.dtype not in SKINNY_DTYPES or weight.numel() == 0:
            return False
        if self._config(width, weight.shape[1], 1, is_gated=is_gated) is None:
            return False
        # It will be read ahead of the kernels in front of a product: what writes it must be done.
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        return True
