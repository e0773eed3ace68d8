"""VocabularyEmbedding and VocabularyHead: a decoder's two ends, the vocabulary divided among the ranks."""

import torch
from torch import nn
from torch.nn import functional

from workers.layers.linear import Linear, zeros
from workers.layers.placement import Placement, shard_run
from workers.models.sharding import ceil_div
from workers.parallel import TPGroup


class VocabularyEmbedding(nn.Module):
    """Rows of the embedding matrix; each rank holds an equal share, the last one's padded with zero rows."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: TPGroup,
    ) -> None:
        super().__init__()
        share = ceil_div(vocab_size, group.size)
        self.weight = zeros(share, hidden_size, dtype=dtype, device=device)
        self._vocab_size = vocab_size
        self._first = group.rank * share
        self._share = share
        self._group = group

    def placement(self) -> Placement:
        """Return where this rank's share of the checkpoint's [vocab, hidden] matrix goes."""
        return vocabulary_placement(self.weight, self._vocab_size, self._group.rank)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up [tokens] int64, giving [tokens, hidden] on every rank."""
        if self._group.size == 1:
            return functional.embedding(token_ids, self.weight)
        # A rank looks up row 0 for tokens of other ranks, blanks it, and the sum over ranks fills it in.
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self._share)
        rows = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return self._group.sum(rows)


class VocabularyHead(Linear):
    """The projection to logits: each rank computes its share of the vocabulary."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: TPGroup,
        tied: VocabularyEmbedding | None,
    ) -> None:
        share = ceil_div(vocab_size, group.size)
        rows = 0 if tied is not None else share
        super().__init__(hidden_size, rows, bias=False, dtype=dtype, device=device)
        if tied is not None:
            self.weight = tied.weight
        self._vocab_size = vocab_size
        self._group = group
        self.num_tokens = min(share, vocab_size - group.rank * share)
        """Tokens of this rank's share; the last one's rows are more"""

    def placement(self) -> Placement:
        """Return where this rank's share of the checkpoint's [vocab, hidden] matrix goes."""
        return vocabulary_placement(self.weight, self._vocab_size, self._group.rank)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [rows, num_tokens], of this rank's share; rows may lie apart."""
        logits: torch.Tensor = self(hidden)
        return logits[:, : self.num_tokens]


def vocabulary_placement(weight: torch.Tensor, vocab_size: int, rank: int) -> Placement:
    """Return rank's share of a [vocab, hidden] matrix."""
    share, hidden_size = weight.shape
    return Placement(weight, (vocab_size, hidden_size), shard_run(vocab_size, rank, share))
