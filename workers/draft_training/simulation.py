"""EAGLE-3's training by simulated drafting (https://arxiv.org/abs/2503.01840): every place of a batch drafts
on for some steps, as the Speculator would from there, and is told what the target thinks.

The draft itself is the one that serves; it computes here as it does there, over another attention.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.draft_training.batches import Batch
from workers.draft_training.padded_attention import PaddedAttention, SimulatedAttention
from workers.draft_training.vocabulary import DraftVocabulary
from workers.models.decoder import Decoder
from workers.models.draft import DraftModel

_STEP_DECAY = 0.8
"""What a step's loss counts, of that of the step before: a draft behind a wrong one is lost."""
_ROWS_AT_A_TIME = 8192
"""Whose logits over the target's whole vocabulary are held at once."""


@dataclass(frozen=True)
class TargetView:
    """What the target makes of a batch: taps [tokens, hidden] float32, and at each asked place its likeliest
    next token [asks] int64 and its distribution among the draft's tokens [asks, draft vocabulary] float32."""

    taps: list[Tensor]
    best: Tensor
    known: Tensor
    """[asks] bool: the draft's vocabulary has the likeliest token."""
    probabilities: Tensor


@torch.no_grad()
def view_target(
    decoder: Decoder, batch: Batch, layers: Sequence[int], vocabulary: DraftVocabulary
) -> TargetView:
    """Run the target over a batch."""
    attention = PaddedAttention(*batch.token_ids.shape)
    last, taps = decoder.forward_tapped(batch.token_ids.view(-1), batch.positions, attention, layers)
    hidden = last.index_select(0, batch.asked)
    best, drafted = [], []
    for rows in torch.split(hidden, _ROWS_AT_A_TIME):
        logits = decoder.logits(rows)
        best.append(logits.argmax(dim=-1))
        drafted.append(logits.index_select(1, vocabulary.target_ids).float().softmax(dim=-1))
    likeliest = torch.cat(best)
    taps = [tap.float() for tap in taps]  # autocast to bfloat16 joins no float16
    return TargetView(taps, likeliest, vocabulary.is_known.index_select(0, likeliest), torch.cat(drafted))


def simulate(
    draft: DraftModel, batch: Batch, taps: Sequence[Tensor], num_steps: int, *, has_first_entry: bool = True
) -> list[Tensor]:
    """Return what `forward` gives in each step, [tokens, hidden], for the entries at all places.

    The entry at place i of step s consumes the token there and, drafted from place i - s on, the draft's own
    feature of step s - 1 at place i - 1; in step 0 the target's. What came before place s is of no use.
    `has_first_entry`: entries see that of the row's first token, as they do where the draft serves.
    """
    num_rows, length = batch.token_ids.shape
    attention = SimulatedAttention(num_rows, length, has_first_entry=has_first_entry)
    token_ids, positions = batch.token_ids.view(-1), batch.positions
    feature = draft.feature(taps)
    found: list[Tensor] = []
    for _ in range(num_steps):
        features = _shifted(feature.view(num_rows, length, -1)).reshape(num_rows * length, -1)
        hidden = draft.forward(token_ids, features, positions, attention)
        found.append(hidden)
        feature = draft.next_feature(hidden)
    return found


@dataclass(frozen=True)
class Simulated:
    """What came of a batch. `loss`: a scalar to be minimised; `right` [steps, asks] bool: step s's guess from
    s places before was the target's choice, had the drafts before it been right; False where there are no
    such places."""

    loss: Tensor
    right: Tensor


def draft_and_compare(
    draft: DraftModel,
    batch: Batch,
    target: TargetView,
    vocabulary: DraftVocabulary,
    num_steps: int,
    *,
    has_first_entry: bool = True,
) -> Simulated:
    """Simulate drafting and compare it with the target: cross entropy with its distribution, where the
    draft's vocabulary has its likeliest token."""
    loss = target.probabilities.new_zeros(())
    total_weight = sum(_STEP_DECAY**step for step in range(num_steps))
    right = []
    simulated = simulate(draft, batch, target.taps, num_steps, has_first_entry=has_first_entry)
    for step, hidden in enumerate(simulated):
        logits = draft.logits(hidden.index_select(0, batch.asked))
        is_reached = batch.behind >= step
        weights = (target.known & is_reached).float()
        losses = functional.cross_entropy(logits.float(), target.probabilities, reduction="none")
        mean = (losses * weights).sum() / weights.sum().clamp(min=1.0)
        loss = loss + _STEP_DECAY**step / total_weight * mean
        guesses = vocabulary.target_ids[logits.detach().argmax(dim=-1)]
        right.append((guesses == target.best) & is_reached)
    return Simulated(loss, torch.stack(right))


def precision_of(decoder: Decoder, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return in what a draft beside this target computes: bfloat16 over float32 weights, but for float32 on
    the CPU."""
    if device.type == "cpu" and decoder.norm.weight.dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _shifted(features: Tensor) -> Tensor:
    """Return [rows, length, size] with each row moved on by a place; the first entry's feature is zeros."""
    return functional.pad(features[:, :-1], (0, 0, 1, 0))
