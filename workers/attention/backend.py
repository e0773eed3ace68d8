"""AttentionBackend: what the decoder's layers ask of attention over the paged KV pool.

Built by ModelRunner over one KVPool, planned once a step, called once per layer, in the engine's thread.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from workers.engine.forward_batch import ForwardBatch
from workers.plan import Mode


@dataclass(frozen=True)
class AttentionLayer:
    """One rank's share of a layer's attention. `sliding_window`: tokens a token sees, itself included."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None


class AttentionBackend(Protocol):
    """Causal attention of a ragged batch over pages; rows of any length, extend and decode mixed."""

    @property
    def captured_modes(self) -> frozenset[Mode]:
        """Modes whose passes a CUDA graph may hold: `begin` and `forward` then launch the same kernels on the
        same addresses for every batch of a bucket."""
        ...

    def plan(self, batch: ForwardBatch) -> None:
        """Compute once whatever all layers of the step need. Called outside any captured graph.

        Token positions[i] of row r attends to the row's positions 0 .. positions[i] (within the layer's
        window), found at page_rows[r, position // page_size] * page_size + position % page_size.
        """

    def begin(self) -> None:
        """Compute on the device whatever all layers of the planned batch read. The first thing of a pass, and
        part of a captured graph."""

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Write k, v at the batch's out_locations of `layer`, attend, return [tokens, num_heads * head_dim].

        q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim], after RoPE, in the pool's
        dtype, possibly strided views. The result is the caller's until the next call.
        """
