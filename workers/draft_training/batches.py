"""Batches of a corpus: padded tokens, and where in them a draft is asked. No more than (seed, step) decides
which come when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor

from workers.draft_training.corpus import Sample

_LENGTH_STEP = 16
"""Rows are padded to a multiple of it: kernels have few shapes to know."""
_SORTED_BATCHES = 16
"""Samples of about as many batches are sorted by length among themselves, so that little is padded."""


@dataclass(frozen=True)
class Batch:
    """Samples padded to one length. A draft is asked at the entries of answers, but for their last token.

    `asked` [asks] int64: the places, rows one after another, of the entries whose next token the target
    wrote; `behind` [asks]: how many entries of the same answer lie before each, so that one with `behind`
    >= s may have been reached in s steps.
    """

    token_ids: Tensor
    """[rows, length] int64."""
    asked: Tensor
    behind: Tensor

    @property
    def positions(self) -> Tensor:
        """Positions [rows * length] int64."""
        num_rows, length = self.token_ids.shape
        return torch.arange(length, device=self.token_ids.device).repeat(num_rows)


def make_batch(samples: Sequence[Sample], max_len: int, device: torch.device) -> Batch:
    """Return the samples' batch on `device`; tokens behind `max_len` are left out."""
    lens = [min(len(sample.token_ids), max_len) for sample in samples]
    length = -(-max(lens) // _LENGTH_STEP) * _LENGTH_STEP
    token_ids = np.zeros((len(samples), length), dtype=np.int64)
    asked, behind = [], []
    for row, (sample, size) in enumerate(zip(samples, lens, strict=True)):
        token_ids[row, :size] = sample.token_ids[:size]
        asked.append(row * length + np.arange(sample.prompt_len, size - 1))
        behind.append(np.arange(max(0, size - 1 - sample.prompt_len)))
    arrays = (token_ids, np.concatenate(asked), np.concatenate(behind))
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return Batch(*tensors)


def epoch_batches(
    lens: Sequence[int], batch_tokens: int, max_len: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return one epoch's batches as indices of samples, each padded to at most `batch_tokens` tokens."""
    draws = Random(f"{seed}/{epoch}")
    order = list(range(len(lens)))
    draws.shuffle(order)
    mean_len = sum(lens) / max(1, len(lens))
    group_size = max(1, round(_SORTED_BATCHES * batch_tokens / max(1.0, mean_len)))
    batches: list[list[int]] = []
    for first in range(0, len(order), group_size):
        batches += _packed(
            sorted(order[first : first + group_size], key=lens.__getitem__), lens, batch_tokens, max_len
        )
    draws.shuffle(batches)
    return batches


def batches_from(
    lens: Sequence[int], batch_tokens: int, max_len: int, seed: int, first_step: int
) -> Iterator[list[int]]:
    """Yield the batches of steps from `first_step` on, without end."""
    epoch, step = 0, 0
    while True:
        batches = epoch_batches(lens, batch_tokens, max_len, seed, epoch)
        if step + len(batches) > first_step:
            yield from batches[max(0, first_step - step) :]
        step += len(batches)
        epoch += 1


def _packed(
    order: Sequence[int], lens: Sequence[int], batch_tokens: int, max_len: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:  # the longest comes last: it is what the others are padded to
        length = -(-min(lens[index], max_len) // _LENGTH_STEP) * _LENGTH_STEP
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
