"""DraftVocabulary: the target's most frequent tokens, which are all that a draft may guess."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.draft_training.corpus import Sample, TokenArray


@dataclass(frozen=True)
class DraftVocabulary:
    """`target_ids` [draft vocabulary] int64: each draft id's token, ascending. `is_known` [vocabulary]."""

    target_ids: Tensor
    is_known: Tensor

    @classmethod
    def of(cls, target_ids: Tensor, vocab_size: int) -> "DraftVocabulary":
        """Return the vocabulary of these tokens."""
        is_known = torch.zeros(vocab_size, dtype=torch.bool, device=target_ids.device)
        is_known[target_ids] = True
        return cls(target_ids, is_known)

    def tables(self) -> dict[str, Tensor]:
        """Return EAGLE-3's tables: `d2t`, what to add to a draft id to get its token; `t2d`: who has one."""
        target_ids = self.target_ids.cpu()
        return {"d2t": target_ids - torch.arange(len(target_ids)), "t2d": self.is_known.cpu()}


def count_tokens(samples: Iterable[Sample], vocab_size: int) -> TokenArray:
    """Return how often the answers have each token, [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sample in samples:
        counts += np.bincount(sample.token_ids[sample.prompt_len :], minlength=vocab_size)
    return counts


def most_frequent(counts: TokenArray, size: int) -> TokenArray:
    """Return the `size` most frequent tokens, ascending; of equally frequent ones the first."""
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def coverage(counts: TokenArray, target_ids: TokenArray) -> float:
    """Return which share of the counted tokens are among `target_ids`."""
    return float(counts[target_ids].sum() / max(1, counts.sum()))
