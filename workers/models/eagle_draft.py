"""EagleDraft, Eagle3Draft and MTPDraft: published heads as DraftModels, sharded as the target is.

They are no modules themselves: what they share with the target stays the target's, adopted by it alone.
Filled by `workers.models.draft_weights` through `placements`, by the own names of `workers.draft_layouts`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from workers.attention.backend import AttentionBackend, AttentionLayer
from workers.draft_layouts import MTP_LAYOUTS
from workers.layers.kernels import LayerKernels
from workers.layers.linear import summed
from workers.layers.placement import Placement, whole
from workers.models.decoder import DecoderLayer, adopt_all
from workers.models.draft_parts import DraftEnds, DraftPlan, EagleLayer


class EagleDraft:
    """EAGLE-1 (https://arxiv.org/abs/2401.15077) and EAGLE-2, which drafts trees with the same head.

    Its feature is the target's last hidden state after the final norm, and its output guesses that of the
    next token: the target's head reads both. The first layer has no input norm.
    """

    def __init__(self, plan: DraftPlan) -> None:
        card, config = plan.card, plan.config
        self.feature_layers = card.feature_layers
        self.feature_size = card.feature_size
        self.draft_vocab_size = card.draft_vocab_size
        self._decoder = plan.decoder
        self.ends = DraftEnds(plan)
        self._fc = plan.projection(2 * config.hidden_size)
        self._first = EagleLayer(plan)
        self._rest = [
            DecoderLayer(
                config,
                card.target_num_layers + index,
                dtype=plan.dtype,
                device=plan.device,
                group=plan.decoder.group,
            )
            for index in range(1, config.num_layers)
        ]
        self._rotary = plan.rotary()

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """See DraftModel."""
        return [self._first.attention.layer, *(layer.attention.layer for layer in self._rest)]

    def feature(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the normalised last hidden state."""
        normalised: torch.Tensor = self._decoder.norm(taps[0])
        return normalised

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """See DraftModel."""
        x = self._fc(torch.cat((self.ends.embedding(token_ids), features), dim=-1))
        cos, sin = self._rotary(positions)
        hidden, delta = self._first(x, x, cos, sin, attention)
        for layer in self._rest:
            hidden, delta = layer(hidden, delta, cos, sin, attention)
        out: torch.Tensor = hidden + summed(delta)
        return out

    def extend(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> None:
        """See DraftModel."""
        if self._rest:
            self.forward(token_ids, features, positions, attention)
            return
        x = self._fc(torch.cat((self.ends.embedding(token_ids), features), dim=-1))
        cos, sin = self._rotary(positions)
        self._first.write(x, cos, sin, attention)

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output: it was trained to be the next feature."""
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See DraftModel. No norm: `hidden` stands for a normalised state."""
        return self.ends.head.logits(hidden)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Return them as they are."""
        return draft_ids

    def placements(self) -> dict[str, Placement]:
        """Return, by own name, where this rank's share of each tensor goes."""
        found = {**self.ends.placements(), "fc.weight": whole(self._fc.weight)}
        if self._fc.bias is not None:
            found["fc.bias"] = whole(self._fc.bias)
        layers: list[EagleLayer | DecoderLayer] = [self._first, *self._rest]
        for index, layer in enumerate(layers):
            for name, placement in layer.placements():
                found[f"layers.{index}.{name}"] = placement
        return found

    def adopt(self, kernels: LayerKernels) -> None:
        """See DraftModel."""
        adopt_all(nn.ModuleList([*self.ends.own, self._fc, self._first, *self._rest]), kernels)


class Eagle3Draft:
    """EAGLE-3 (https://arxiv.org/abs/2503.01840): one layer over the normalised embedding and feature.

    Its feature is fc over the target's stream at a low, a middle and a high layer; its own stream before the
    norm stands in for it while drafting on. Its head knows the most frequent tokens alone.
    """

    def __init__(self, plan: DraftPlan) -> None:
        card, config = plan.card, plan.config
        self.feature_layers = card.feature_layers
        self.feature_size = card.feature_size
        self.draft_vocab_size = card.draft_vocab_size
        self.ends = DraftEnds(plan)
        self._norm_before_residual = card.norm_before_residual
        self._fc = plan.projection(len(card.feature_layers) * card.target_hidden_size)
        self._embedding_norm = plan.norm()
        self._feature_norm = plan.norm()
        self._layer = EagleLayer(plan, input_size=2 * config.hidden_size)
        self._norm = plan.norm()
        self._rotary = plan.rotary()
        self.target_id_table: torch.Tensor | None = None
        """Each draft id's target id, [draft vocabulary] int64; None: they are the same."""

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """See DraftModel."""
        return [self._layer.attention.layer]

    def feature(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return fc of the three taps side by side."""
        features: torch.Tensor = self._fc(torch.cat(tuple(taps), dim=-1))
        return features

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """See DraftModel."""
        x, normalised = self._attended(token_ids, features)
        stream = normalised if self._norm_before_residual else features
        hidden, delta = self._layer(stream, x, *self._rotary(positions), attention)
        out: torch.Tensor = hidden + summed(delta)
        return out

    def extend(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> None:
        """See DraftModel."""
        cos, sin = self._rotary(positions)
        self._layer.write(self._attended(token_ids, features)[0], cos, sin, attention)

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the stream before the norm, as it was trained to read it."""
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See DraftModel."""
        return self.ends.head.logits(self._norm(hidden))

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """See DraftModel."""
        return draft_ids if self.target_id_table is None else self.target_id_table[draft_ids]

    def placements(self) -> dict[str, Placement]:
        """Return, by own name, where this rank's share of each tensor goes; not d2t, which is no weight."""
        found = {
            **self.ends.placements(),
            "fc.weight": whole(self._fc.weight),
            "layers.0.input_layernorm.weight": whole(self._embedding_norm.weight),
            "layers.0.hidden_norm.weight": whole(self._feature_norm.weight),
            "norm.weight": whole(self._norm.weight),
        }
        if self._fc.bias is not None:
            found["fc.bias"] = whole(self._fc.bias)
        return found | {f"layers.0.{name}": placement for name, placement in self._layer.placements()}

    def adopt(self, kernels: LayerKernels) -> None:
        """See DraftModel."""
        own = [self._fc, self._embedding_norm, self._feature_norm, self._layer, self._norm]
        adopt_all(nn.ModuleList([*self.ends.own, *own]), kernels)

    def _attended(self, token_ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layer attends over, [tokens, 2 * hidden], and its second half."""
        normalised = self._feature_norm(features)
        embedded = self._embedding_norm(self.ends.embedding(token_ids))
        return torch.cat((embedded, normalised), dim=-1), normalised


class MTPDraft:
    """A multi-token prediction layer as DeepSeek-V3 (https://arxiv.org/abs/2412.19437) and MiMo publish it.

    Its feature is the target's last hidden state after the final norm; its own output, normalised by its own
    final norm, follows in its place. Of several such layers the first drafts every token.
    """

    def __init__(self, plan: DraftPlan) -> None:
        card, config = plan.card, plan.config
        assert card.mtp_layout is not None, card
        self.feature_layers = card.feature_layers
        self.feature_size = card.feature_size
        self.draft_vocab_size = card.draft_vocab_size
        self._decoder = plan.decoder
        self._is_feature_first = MTP_LAYOUTS[card.mtp_layout].is_feature_first
        self.ends = DraftEnds(plan)
        self._embedding_norm = plan.norm()
        self._feature_norm = plan.norm()
        self._fc = plan.projection(2 * config.hidden_size)
        self._layer = DecoderLayer(
            config, card.target_num_layers, dtype=plan.dtype, device=plan.device, group=plan.decoder.group
        )
        self._norm = plan.norm()
        self._rotary = plan.rotary()

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """See DraftModel."""
        return [self._layer.attention.layer]

    def feature(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the normalised last hidden state."""
        normalised: torch.Tensor = self._decoder.norm(taps[0])
        return normalised

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """See DraftModel."""
        embedded = self._embedding_norm(self.ends.embedding(token_ids))
        normalised = self._feature_norm(features)
        pair = (normalised, embedded) if self._is_feature_first else (embedded, normalised)
        x = self._fc(torch.cat(pair, dim=-1))
        hidden, delta = self._layer(x, None, *self._rotary(positions), attention)
        return self._norm.add(hidden, delta)[1]

    def extend(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> None:
        """See DraftModel."""
        self.forward(token_ids, features, positions, attention)

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output, normalised as the target's are."""
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See DraftModel."""
        return self.ends.head.logits(hidden)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Return them as they are."""
        return draft_ids

    def placements(self) -> dict[str, Placement]:
        """Return, by own name, where this rank's share of each tensor goes."""
        found: Mapping[str, Placement] = {
            **self.ends.placements(),
            "enorm.weight": whole(self._embedding_norm.weight),
            "hnorm.weight": whole(self._feature_norm.weight),
            "fc.weight": whole(self._fc.weight),
            "norm.weight": whole(self._norm.weight),
        }
        return {**found, **{f"layers.0.{name}": placement for name, placement in self._layer.placements()}}

    def adopt(self, kernels: LayerKernels) -> None:
        """See DraftModel."""
        own = [self._embedding_norm, self._feature_norm, self._fc, self._layer, self._norm]
        adopt_all(nn.ModuleList([*self.ends.own, *own]), kernels)
