"""Attention: projections, q/k norm and RoPE around the AttentionBackend, heads divided among the ranks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from workers.attention.backend import AttentionBackend, AttentionLayer
from workers.layers.kernels import LayerKernels
from workers.layers.linear import Delta, Linear, RowParallelLinear
from workers.layers.norm import RMSNorm
from workers.layers.placement import Placement, Run, head_runs, whole
from workers.layers.rotary import rotate
from workers.models.config import ModelConfig
from workers.models.sharding import head_layout
from workers.parallel import TPGroup


@runtime_checkable
class RotatingBackend(Protocol):
    """What an AttentionBackend may do besides: rotate and write keys in one kernel."""

    def forward_unrotated(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """As AttentionBackend.forward for q and k before RoPE, whose memory it may use."""


@runtime_checkable
class WritingBackend(Protocol):
    """What an AttentionBackend of a KV pool does besides: write where nobody attends."""

    def write(self, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k and v, after RoPE, as AttentionBackend.forward does."""


class Attention(nn.Module):
    """One layer's attention. One fused projection makes q, k and v:

    rows of qkv.weight:  [ q heads * head_dim | k heads * head_dim | v heads * head_dim ]

    `input_size`: features of what is attended over (None: hidden_size, as the result has in any case).
    `writes_alone`: `write` will be called, which has k and v made by themselves.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: TPGroup,
        input_size: int | None = None,
        writes_alone: bool = False,
    ) -> None:
        super().__init__()
        heads = head_layout(config, group.size)
        self._config = config
        self._input_size = config.hidden_size if input_size is None else input_size
        self._heads = heads.heads(group.rank)
        self._kv_heads = heads.kv_heads(group.rank)
        self.layer = AttentionLayer(
            index=index,
            num_heads=heads.heads_per_rank,
            num_kv_heads=heads.kv_heads_per_rank,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            sliding_window=config.window_of(index),
        )
        num_rows = (heads.heads_per_rank + 2 * heads.kv_heads_per_rank) * config.head_dim
        self.qkv = Linear(self._input_size, num_rows, bias=config.qkv_bias, dtype=dtype, device=device)
        self.output = RowParallelLinear(
            heads.heads_per_rank * config.head_dim,
            config.hidden_size,
            bias=config.output_bias,
            dtype=dtype,
            device=device,
            group=group,
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
        self._kernels: LayerKernels | None = None
        self._writes_alone = writes_alone
        self._kv: Callable[[torch.Tensor], torch.Tensor] = self._plain_kv

    def adopt(self, kernels: LayerKernels) -> None:
        """Rotate by a compiled kernel from now on; the projections and norms adopt theirs themselves,
        afterwards."""
        self._kernels = kernels
        if self._writes_alone:
            weight, bias = self._kv_weights()
            self._kv = kernels.matmul(weight, bias) or partial(functional.linear, weight=weight, bias=bias)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        """Yield checkpoint names (under the layer's self_attn) and where this rank's share goes."""
        config, dim = self._config, self._config.head_dim
        key_start = len(self._heads) * dim
        value_start = key_start + len(self._kv_heads) * dim
        for name, num_heads, runs in (
            ("q_proj", config.num_heads, head_runs(self._heads, dim)),
            ("k_proj", config.num_kv_heads, head_runs(self._kv_heads, dim, key_start)),
            ("v_proj", config.num_kv_heads, head_runs(self._kv_heads, dim, value_start)),
        ):
            num_rows = num_heads * dim
            yield f"{name}.weight", Placement(self.qkv.weight, (num_rows, self._input_size), runs)
            if self.qkv.bias is not None:
                yield f"{name}.bias", Placement(self.qkv.bias, (num_rows,), runs)
        shape = (config.hidden_size, config.num_heads * dim)
        rows = (Run(0, 0, config.hidden_size),)
        yield "o_proj.weight", Placement(self.output.weight, shape, rows, head_runs(self._heads, dim))
        if self.output.whole_bias is not None:
            yield "o_proj.bias", whole(self.output.whole_bias)
        if self.q_norm is not None and self.k_norm is not None:
            yield "q_norm.weight", whole(self.q_norm.weight)
            yield "k_norm.weight", whole(self.k_norm.weight)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: AttentionBackend
    ) -> Delta:
        """Map [tokens, input_size] (normalised) to [tokens, hidden], writing the tokens' KV on the way."""
        layer = self.layer
        num_rotated = layer.num_heads + layer.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], -1, layer.head_dim)  # [tokens, q + k + v heads, head_dim]
        q, k, v = qkv[:, : layer.num_heads], qkv[:, layer.num_heads : num_rotated], qkv[:, num_rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(backend, RotatingBackend):
            attended = backend.forward_unrotated(layer, q, k, v, cos, sin)
        elif self.q_norm is not None:
            attended = backend.forward(layer, self._rotate(q, cos, sin), self._rotate(k, cos, sin), v)
        else:
            rotated = self._rotate(qkv[:, :num_rotated], cos, sin)  # q and k lie side by side: both at once
            attended = backend.forward(layer, rotated[:, : layer.num_heads], rotated[:, layer.num_heads :], v)
        return self.output.project(attended)

    def write(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: AttentionBackend) -> None:
        """Write the KV of tokens [tokens, input_size] (normalised), and no more."""
        layer = self.layer
        assert isinstance(backend, WritingBackend), f"{type(backend).__name__} has no pool"
        kv = self._kv(x).view(x.shape[0], -1, layer.head_dim)  # [tokens, k + v heads, head_dim]
        k, v = kv[:, : layer.num_kv_heads], kv[:, layer.num_kv_heads :]
        if self.k_norm is not None:
            k = self.k_norm(k)
        backend.write(layer, self._rotate(k, cos, sin), v)

    def _kv_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows of qkv that make k and v, in the memory of all of them."""
        first = self.layer.num_heads * self.layer.head_dim
        bias = self.qkv.bias
        return self.qkv.weight.detach()[first:], None if bias is None else bias.detach()[first:]

    def _plain_kv(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, *self._kv_weights())

    def _rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate heads that nobody else reads: the kernel does it in place."""
        if self._kernels is not None:
            return self._kernels.rotate_(heads, cos, sin)
        return rotate(heads, cos, sin)
