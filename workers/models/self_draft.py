"""SelfDraft: the target as its own draft, always of one mind. For tests, and the ceiling in benchmarks."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from workers.attention.backend import AttentionBackend, AttentionLayer
from workers.engine.forward_batch import ForwardBatch
from workers.layers.attention import RotatingBackend
from workers.layers.kernels import LayerKernels
from workers.models.decoder import Decoder
from workers.plan import Mode


class SelfDraft:
    """See DraftModel. Runs the target's layers over KV layers of its own; features say nothing."""

    feature_size = 1
    """A tail of no bytes would be none; these are zeros."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        num_layers = decoder.config.num_layers
        self.attention_layers = [
            replace(layer, index=num_layers + layer.index) for layer in decoder.attention_layers
        ]
        self.feature_layers = (num_layers,)
        self.draft_vocab_size = decoder.config.vocab_size

    def feature(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return zeros."""
        return taps[0].new_zeros(taps[0].shape[0], self.feature_size)

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """Run the target over the draft's KV."""
        wrapper = _MovedRotatingLayers if isinstance(attention, RotatingBackend) else _MovedLayers
        return self._decoder.forward(token_ids, positions, wrapper(attention, self.attention_layers))

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
        """Return zeros."""
        return hidden.new_zeros(hidden.shape[0], self.feature_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the target's."""
        return self._decoder.logits(hidden)

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Return them as they are."""
        return draft_ids

    def adopt(self, kernels: LayerKernels) -> None:
        """Do nothing: all layers are the target's."""


class _MovedLayers:
    """A planned backend in which the target's layers have the places of the draft's."""

    def __init__(self, attention: AttentionBackend, layers: list[AttentionLayer]) -> None:
        self._attention = attention
        self._layers = layers

    @property
    def captured_modes(self) -> frozenset[Mode]:
        return self._attention.captured_modes

    def plan(self, batch: ForwardBatch) -> None:
        self._attention.plan(batch)

    def begin(self) -> None:
        self._attention.begin()

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._attention.forward(self._layers[layer.index], q, k, v)


class _MovedRotatingLayers(_MovedLayers):
    """The same for a RotatingBackend."""

    def forward_unrotated(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        assert isinstance(self._attention, RotatingBackend)
        return self._attention.forward_unrotated(self._layers[layer.index], q, k, v, cos, sin)
