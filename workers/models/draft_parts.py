"""What drafts are made of beside a decoder's layers: shared or own ends, a layer without an input norm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from workers.attention.backend import AttentionBackend
from workers.draft_card import DraftCard
from workers.layers.attention import Attention
from workers.layers.embedding import VocabularyEmbedding, VocabularyHead
from workers.layers.linear import Delta, Linear
from workers.layers.mlp import GatedMLP
from workers.layers.norm import RMSNorm
from workers.layers.placement import Placement, whole
from workers.layers.rotary import Rotary
from workers.models.config import ModelConfig
from workers.models.decoder import Decoder


@dataclass(frozen=True)
class DraftPlan:
    """What to build a draft from. `brought`: own names of the tensors that its checkpoint has, which decide
    what is shared with the target and where there are biases."""

    card: DraftCard
    decoder: Decoder
    brought: frozenset[str]
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> ModelConfig:
        """The card's, with the biases of the checkpoint."""
        return replace(
            self.card.config,
            qkv_bias="layers.0.self_attn.q_proj.bias" in self.brought,
            output_bias="layers.0.self_attn.o_proj.bias" in self.brought,
            mlp_bias="layers.0.mlp.gate_proj.bias" in self.brought,
        )

    def norm(self, size: int | None = None) -> RMSNorm:
        """Return an unfilled norm of `size` (None: the draft's hidden size)."""
        size = self.config.hidden_size if size is None else size
        return RMSNorm(size, self.config.rms_norm_eps, dtype=self.dtype, device=self.device)

    def projection(self, in_features: int) -> Linear:
        """Return the unfilled fc to the draft's hidden size. Every rank holds all of it: it is small, and
        features are whole on every rank."""
        return Linear(
            in_features,
            self.config.hidden_size,
            bias="fc.bias" in self.brought,
            dtype=self.dtype,
            device=self.device,
        )

    def rotary(self) -> Rotary:
        """Return the target's table where the draft rotates alike, else one for as many positions."""
        target, own = self.decoder.config, self.config
        if (own.rope_theta, own.rope_scaling, own.head_dim) == (
            target.rope_theta,
            target.rope_scaling,
            target.head_dim,
        ):
            return self.decoder.rotary
        return Rotary(own, self.decoder.rotary.table.shape[0], dtype=self.dtype, device=self.device)


class EagleLayer(nn.Module):
    """A decoder layer that leaves the norms of its input to the caller."""

    def __init__(self, plan: DraftPlan, *, input_size: int | None = None) -> None:
        super().__init__()
        config, group = plan.config, plan.decoder.group
        self.attention = Attention(
            config,
            plan.card.target_num_layers,
            dtype=plan.dtype,
            device=plan.device,
            group=group,
            input_size=input_size,
            writes_alone=True,
        )
        self.mlp_norm = plan.norm()
        self.mlp = GatedMLP(config, dtype=plan.dtype, device=plan.device, group=group)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        """Yield checkpoint names under the layer and where this rank's share goes."""
        yield "post_attention_layernorm.weight", whole(self.mlp_norm.weight)
        for name, placement in self.attention.placements():
            yield f"self_attn.{name}", placement
        for name, placement in self.mlp.placements():
            yield f"mlp.{name}", placement

    def forward(
        self,
        hidden: torch.Tensor,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        backend: AttentionBackend,
    ) -> tuple[torch.Tensor, Delta]:
        """Take the residual stream [tokens, hidden] and what is attended over, [tokens, input_size]; return
        the stream and what is yet to be added to it, as DecoderLayer does."""
        hidden, x = self.mlp_norm.add(hidden, self.attention(x, cos, sin, backend))
        return hidden, self.mlp(x)

    def write(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: AttentionBackend) -> None:
        """Write the KV of what would be attended over, [tokens, input_size]: all that a last layer leaves."""
        self.attention.write(x, cos, sin, backend)


class DraftEnds:
    """A draft's embedding and head: its own where the checkpoint brings them, else the target's, shared."""

    def __init__(self, plan: DraftPlan) -> None:
        card, config, decoder = plan.card, plan.config, plan.decoder
        self._decoder = decoder
        self.draft_vocab_size = card.draft_vocab_size
        self.embedding: VocabularyEmbedding = decoder.embedding
        self.head: VocabularyHead = decoder.head
        if "embed_tokens.weight" in plan.brought or config.hidden_size != card.target_hidden_size:
            self.embedding = VocabularyEmbedding(
                config.vocab_size,
                config.hidden_size,
                dtype=plan.dtype,
                device=plan.device,
                group=decoder.group,
            )
        if (
            "lm_head.weight" in plan.brought
            or card.draft_vocab_size != config.vocab_size
            or config.hidden_size != card.target_hidden_size
        ):
            self.head = VocabularyHead(
                card.draft_vocab_size,
                config.hidden_size,
                dtype=plan.dtype,
                device=plan.device,
                group=decoder.group,
                tied=None,
            )

    @property
    def own(self) -> list[nn.Module]:
        """What is not the target's."""
        pairs = ((self.embedding, self._decoder.embedding), (self.head, self._decoder.head))
        return [module for module, target in pairs if module is not target]

    def placements(self) -> Mapping[str, Placement]:
        """Return where this rank's share of each brought tensor goes."""
        found = {}
        if self.embedding is not self._decoder.embedding:
            found["embed_tokens.weight"] = self.embedding.placement()
        if self.head is not self._decoder.head:
            found["lm_head.weight"] = self.head.placement()
        return found

    def share_copies(self) -> None:
        """Give up what turned out to be a copy of the target's: most checkpoints repeat its embedding."""
        if torch.equal(self.embedding.weight, self._decoder.embedding.weight):
            self.embedding = self._decoder.embedding
        has_all_columns = self.draft_vocab_size == self._decoder.config.vocab_size
        if has_all_columns and torch.equal(self.head.weight, self._decoder.head.weight):
            self.head = self._decoder.head
