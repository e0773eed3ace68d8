"""ModelRunner: one rank's decoder over one KV pool, run on whatever batch is staged. The engine's thread."""

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.attention.backend import AttentionBackend
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool


class LanguageModel(Protocol):
    """What ModelRunner needs of workers.models.decoder.Decoder."""

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionBackend
    ) -> torch.Tensor:
        """Return hidden states [tokens, hidden]."""
        ...

    def forward_tapped(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
        layers: Sequence[int],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `forward`, with the residual stream before each of `layers`."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [rows, this rank's tokens] of hidden [rows, hidden]."""
        ...


class Follower(Protocol):
    """What runs behind the decoder in the same pass; workers.speculative.draft_extend.DraftExtend."""

    feature_layers: tuple[int, ...]
    is_apart: bool
    """It does not: whoever runs the pass runs it afterwards."""

    def look_up(self, batch: ForwardBatch) -> None:
        """Put the tokens that were drafted for its rows into a batch, before it is computed."""

    def features(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """Return the features [tokens, feature_size] of a pass' taps."""
        ...

    def run(self, batch: ForwardBatch, features: torch.Tensor) -> None:
        """Compute the draft's entries of the batch."""


class ModelRunner:
    """Plans and computes a batch. Owns pool and backend; the decoder is shared with nobody else."""

    def __init__(
        self,
        model: LanguageModel,
        attention: AttentionBackend,
        pool: KVPool,
        extend: Follower | None = None,
    ) -> None:
        self._extend = extend
        self.features: torch.Tensor | None = None
        """What the draft takes from the last pass, [tokens, feature_size]; None without a draft."""
        self._model = model
        self._attention = attention
        self.pool = pool

    def plan(self, batch: ForwardBatch) -> None:
        """Prepare attention for the batch: what must happen outside a graph."""
        self._attention.plan(batch)

    def compute(self, batch: ForwardBatch, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """Run the planned batch; return the logits [samples, this rank's tokens] of its sample_indices, in
        order.

        They have the model's dtype and are written to `out`, if it is given. None where nothing is sampled.
        """
        self._attention.begin()
        if self._extend is None:
            hidden = self._model.forward(batch.token_ids, batch.positions, self._attention)
        else:
            self._extend.look_up(batch)
            hidden, taps = self._model.forward_tapped(
                batch.token_ids, batch.positions, self._attention, self._extend.feature_layers
            )
            self.features = self._extend.features(taps)
            if not self._extend.is_apart:
                self._extend.run(batch, self.features)
        num_samples = batch.sample_indices.shape[0]
        if num_samples == 0:
            return None
        if batch.bucket is not None:
            takes_all = batch.bucket.mode != "mixed"
        else:  # where rows verify, samples come in the plan's order, tokens in that of staging
            takes_all = num_samples == batch.num_tokens and batch.mode != "verify"
        if not takes_all:
            hidden = hidden[batch.sample_indices]
        logits = self._model.logits(hidden)
        return logits if out is None else out.copy_(logits)
