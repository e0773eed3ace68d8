"""Decoder: the one transformer for the Llama, Mistral, Qwen2 and Qwen3 families, driven by ModelConfig.

Built and filled by `workers.models.weights`, run by ModelRunner in the engine's thread; one rank's shard.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionLayer
from workers.layers.attention import Attention
from workers.layers.embedding import VocabularyEmbedding, VocabularyHead
from workers.layers.kernels import LayerKernels
from workers.layers.linear import Delta, Linear, summed
from workers.layers.mlp import GatedMLP
from workers.layers.norm import RMSNorm
from workers.layers.placement import Placement, whole
from workers.layers.rotary import Rotary
from workers.models.config import ModelConfig
from workers.parallel import TPGroup


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, index: int, *, dtype: torch.dtype, device: torch.device, group: TPGroup
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, index, dtype=dtype, device=device, group=group)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype=dtype, device=device, group=group)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        """Yield checkpoint names under the layer and where this rank's share goes."""
        yield "input_layernorm.weight", whole(self.attention_norm.weight)
        yield "post_attention_layernorm.weight", whole(self.mlp_norm.weight)
        for name, placement in self.attention.placements():
            yield f"self_attn.{name}", placement
        for name, placement in self.mlp.placements():
            yield f"mlp.{name}", placement

    def forward(
        self,
        hidden: torch.Tensor,
        delta: Delta | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        backend: AttentionBackend,
    ) -> tuple[torch.Tensor, Delta]:
        """Take the residual stream and what the layer before adds to it (None: nothing), [tokens, hidden]
        each; return the same for the next layer. Sums are left to the norm that reads them next."""
        if delta is None:
            x = self.attention_norm(hidden)
        else:
            hidden, x = self.attention_norm.add(hidden, delta)
        hidden, x = self.mlp_norm.add(hidden, self.attention(x, cos, sin, backend))
        return hidden, self.mlp(x)


class Decoder(nn.Module):
    """One rank's shard of a whole model. Weights are zeros until the loader has filled them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: TPGroup,
        max_context_len: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.embedding = VocabularyEmbedding(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device, group=group
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, index, dtype=dtype, device=device, group=group)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.head = VocabularyHead(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            device=device,
            group=group,
            tied=self.embedding if config.tied_embeddings else None,
        )
        self.rotary = Rotary(config, max_context_len or config.max_context_len, dtype=dtype, device=device)

    def placements(self) -> dict[str, Placement]:
        """Return, by Hugging Face tensor name, where this rank's share of each checkpoint tensor goes."""
        found = {
            "model.embed_tokens.weight": self.embedding.placement(),
            "model.norm.weight": whole(self.norm.weight),
        }
        if not self.config.tied_embeddings:
            found["lm_head.weight"] = self.head.placement()
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            for name, placement in layer.placements():
                found[f"model.layers.{index}.{name}"] = placement
        return found

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every layer's attention on this rank, in order."""
        return [layer.attention.layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def adopt(self, kernels: LayerKernels) -> None:
        """Compute by compiled kernels wherever they can; the weights must be loaded."""
        adopt_all(self, kernels)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        """Run tokens [T] int64 at positions [T] int64 of the batch that `attention` was planned for.

        Returns the residual stream after the last layer, [T, hidden], before the final norm.
        """
        return self.forward_tapped(token_ids, positions, attention, ())[0]

    def forward_tapped(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
        layers: Sequence[int],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run as `forward` does; return its result and, in the order of `layers`, the residual stream
        [T, hidden] before each of them. Layer num_layers stands for what `forward` returns.

        Taps are the caller's: no later layer writes them.
        """
        wanted = frozenset(layers)
        tapped: dict[int, torch.Tensor] = {}
        hidden: torch.Tensor = self.embedding(token_ids)
        cos, sin = self.rotary(positions)
        delta: Delta | None = None
        for index, layer in enumerate(self.layers):
            if index in wanted:
                delta = None if delta is None else summed(delta)
                tapped[index] = hidden if delta is None else hidden + delta
            hidden, delta = layer(hidden, delta, cos, sin, attention)
        last = hidden if delta is None else hidden + summed(delta)
        tapped[len(self.layers)] = last
        return last, [tapped[index] for index in layers]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [S, this rank's tokens] in the model's dtype for rows [S, hidden] of `forward`."""
        return self.head.logits(self.norm(hidden))


def adopt_all(root: nn.Module, kernels: LayerKernels) -> None:
    """Hand the kernels to every layer under `root`."""
    for module in root.modules():
        if isinstance(module, Linear | RMSNorm | Attention | GatedMLP):
            module.adopt(kernels)
