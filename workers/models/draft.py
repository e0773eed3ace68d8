"""DraftModel: what the engine asks of a draft model, whichever kind it is. One rank's shard.

Implemented in `workers.models.eagle_draft` and `workers.models.self_draft`, filled by
`workers.models.draft_weights`, run in the engine's thread.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from workers.attention.backend import AttentionBackend, AttentionLayer
from workers.layers.kernels import LayerKernels


class DraftModel(Protocol):
    """A small model that drafts the target's next tokens from its features.

    A draft entry takes a token with the feature of the token before it, and says what comes next:

        target   token 0  token 1  token 2          features of what the target has seen
        feature        f0       f1       f2         `feature` of the target's taps
        entry 0  (token 0, zeros)                   a sequence's first token has no feature before it
        entry 1  (token 1, f0)  -> token 2 ?
        entry 2  (token 2, f1)  -> token 3 ?        -> h: the guess is `target_ids` of `logits(h)`'s best
        entry 3  (the guess, next_feature(h))       while drafting on: provisional, until f2 is known
    """

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """The draft's own KV layers on this rank; their indices go on where the target's end."""
        ...

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """What Decoder.forward_tapped must tap for `feature`; not empty."""
        ...

    @property
    def feature_size(self) -> int:
        """Width of a feature."""
        ...

    @property
    def draft_vocab_size(self) -> int:
        """Columns of `logits`, of all ranks together."""
        ...

    def feature(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the features [T, feature_size] of tokens whose taps are [T, target hidden] each."""
        ...

    def forward(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """Run entries [T] int64 with the features of the tokens before them, [T, feature_size] contiguous, at
        positions [T] int64; `attention` was planned for them and keeps their KV. Returns [T, hidden]."""
        ...

    def extend(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend,
    ) -> None:
        """Keep the KV of entries as `forward` does, and compute no more than that takes."""
        ...

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what stands for the features [S, feature_size] of the entries' tokens while these are not
        known, of rows [S, hidden] of `forward`."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [S, this rank's part of the draft's vocabulary] in the model's dtype for rows [S, hidden] of
        `forward`."""
        ...

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Return the target's token ids of ids of the draft's vocabulary, int64, of any shape."""
        ...

    def adopt(self, kernels: LayerKernels) -> None:
        """Compute by compiled kernels wherever they can; the weights must be loaded. What the draft shares
        with the target is the target's to hand over."""
        ...
