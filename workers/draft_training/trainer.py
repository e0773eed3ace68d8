"""Trainer: a draft's weights, its optimizer, and one step after another. One device, one thread."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workers.draft_training.batches import Batch, batches_from, epoch_batches, make_batch
from workers.draft_training.corpus import Sample
from workers.draft_training.options import TrainOptions
from workers.draft_training.rounds import Evaluated, Tally
from workers.draft_training.simulation import (
    Simulated,
    TargetView,
    draft_and_compare,
    precision_of,
    view_target,
)
from workers.draft_training.vocabulary import DraftVocabulary
from workers.models.decoder import Decoder
from workers.models.eagle_draft import Eagle3Draft

_WARM_UP_RATIO = 0.04
_LAST_RATIO = 0.02
"""Of the peak learning rate, at the end."""
_MAX_GRADIENT_NORM = 1.0
_BETAS = (0.9, 0.95)


class Trainer:
    """Trains `draft`, in float32, beside a `decoder` that stays as it is."""

    def __init__(
        self,
        decoder: Decoder,
        draft: Eagle3Draft,
        vocabulary: DraftVocabulary,
        samples: Sequence[Sample],
        options: TrainOptions,
    ) -> None:
        self.draft = draft
        self.step = 0
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._samples = samples
        self._options = options
        self._device = torch.device(options.device)
        self._max_len = options.max_prompt_tokens + options.max_answer_tokens + 1
        self._lens = [len(sample.token_ids) for sample in samples]
        placements = draft.placements()
        self._parameters = list({id(p.parameter): p.parameter for p in placements.values()}.values())
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=options.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            fused=self._device.type == "cuda",
        )
        per_epoch = len(epoch_batches(self._lens, options.batch_tokens, self._max_len, options.seed, 0))
        self.num_steps = options.steps or max(1, round(options.epochs * per_epoch))
        self._order = batches_from(self._lens, options.batch_tokens, self._max_len, options.seed, 0)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Take the next step; return its loss and, for each draft's place, the share of right ones, both on
        the device: reading them waits for it."""
        batch = make_batch([self._samples[i] for i in next(self._order)], self._max_len, self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * learning_rate_ratio(self.step, self.num_steps)
        target = view_target(self._decoder, batch, self.draft.feature_layers, self._vocabulary)
        with precision_of(self._decoder, self._device):
            simulated = self._simulate(batch, target, self._options.simulated_drafts)
        self._optimizer.zero_grad(set_to_none=True)
        simulated.loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self.step += 1
        return simulated.loss.detach(), self._rates(simulated.right, batch)

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Sample]) -> Evaluated:
        """Let the draft guess along the held-out answers, round after round as a serving engine would."""
        num_steps = self._options.simulated_drafts
        tally = Tally(num_steps)
        lens = [len(sample.token_ids) for sample in held_out]
        for chosen in epoch_batches(lens, self._options.batch_tokens, self._max_len, 0, 0):
            batch = make_batch([held_out[i] for i in chosen], self._max_len, self._device)
            target = view_target(self._decoder, batch, self.draft.feature_layers, self._vocabulary)
            with precision_of(self._decoder, self._device):
                tally.add(self._simulate(batch, target, num_steps).right, batch)
        return tally.evaluated()

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, beside options and corpus."""
        return {
            "step": self.step,
            "parameters": [parameter.detach().cpu() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer with the same options and corpus."""
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        options = self._options
        self._order = batches_from(self._lens, options.batch_tokens, self._max_len, options.seed, self.step)

    def _simulate(self, batch: Batch, target: TargetView, num_steps: int) -> Simulated:
        return draft_and_compare(
            self.draft,
            batch,
            target,
            self._vocabulary,
            num_steps,
            has_first_entry=self._options.first_entry,
        )

    def _rates(self, right: Tensor, batch: Batch) -> Tensor:
        reached = torch.stack([batch.behind >= step for step in range(len(right))])
        return right.sum(dim=1) / reached.sum(dim=1).clamp(min=1)


def learning_rate_ratio(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate that a step has: a rise, then a half turn of a cosine."""
    warm_up = max(1, round(_WARM_UP_RATIO * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    turn = min(1.0, (step - warm_up) / max(1, num_steps - warm_up))
    return _LAST_RATIO + (1 - _LAST_RATIO) * 0.5 * (1 + math.cos(math.pi * turn))
